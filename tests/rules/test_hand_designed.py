"""The hand-designed rules are torch.optim's, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.rules import RULES, HandDesigned, Rule

SHAPES = {"w": (3, 4), "b": (4,), "s": (), "e": (0, 2), "one": (1, 1)}


def draw(seed: int) -> Params:
    """Tensors whose rows differ in scale by powers of ten."""
    generator = make_generator(seed)
    result = {}
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=generator)
        scale = 10 ** (2 * torch.rand(x.shape[:-1], generator=generator) - 1)
        result[name] = x * (scale[..., None] if x.ndim else scale)
    return result


TORCH: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=0.05, weight_decay=wd),
    "momentum": lambda p, wd: torch.optim.SGD(p, lr=0.05, momentum=0.8),
    "nesterov": lambda p, wd: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "rmsprop": lambda p, wd: torch.optim.RMSprop(p, lr=0.05, alpha=0.9),
    "adam": lambda p, wd: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95)),
    "adamw": lambda p, wd: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=wd),
    "nadamw": lambda p, wd: torch.optim.NAdam(
        p, lr=0.05, betas=(0.8, 0.95), weight_decay=wd, decoupled_weight_decay=True
    ),
}
DECAYING = ("sgd", "adamw", "nadamw")  # torch couples the weight decay of the others to their momenta
CASES = [(name, 0.0) for name in TORCH] + [(name, 0.1) for name in DECAYING]


def make_hand_designed(name: str, weight_decay: float) -> Rule:
    hyper = {"momentum": 0.8} if name in ("momentum", "nesterov") else {}
    hyper |= {"beta1": 0.8, "beta2": 0.95} if "adam" in name else {}
    hyper |= {"alpha": 0.9} if name == "rmsprop" else {}
    return RULES[name](lr=0.05, weight_decay=weight_decay, **hyper)


def loss_of(params: Params, step: int) -> Tensor:
    """Curved, of very different scale per row, and not the same twice."""
    target = draw(1000 + step)
    return sum(((p - 0.1 * target[name]) ** 2 * target[name].abs()).sum() for name, p in params.items())


def test_every_hand_designed_rule_has_its_torch_optimizer() -> None:
    assert {name for name, rule in RULES.items() if issubclass(rule, HandDesigned)} == set(TORCH)


@pytest.mark.parametrize(("name", "weight_decay"), CASES, ids=str)
def test_hand_designed_rule_equals_torch_over_100_steps(name: str, weight_decay: float) -> None:
    theirs = {key: p.clone().requires_grad_() for key, p in draw(1).items()}
    optimizer = TORCH[name](list(theirs.values()), weight_decay)
    rule = make_hand_designed(name, weight_decay)
    ours = {key: p.detach().clone() for key, p in theirs.items()}
    state = rule.init_state(ours)
    largest = dict.fromkeys(ours, 0.0)
    for step in range(100):
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        optimizer.step()
        leaves = {key: p.detach().requires_grad_() for key, p in ours.items()}
        grads = torch.autograd.grad(loss_of(leaves, step), list(leaves.values()))
        with torch.no_grad():
            ours, state = rule.update(dict(zip(leaves, grads, strict=True)), leaves, state)
        for key, p in theirs.items():
            if p.numel():
                # fp32 rounds by 6e-8 of what the parameter was when it was largest; the two round in another order
                largest[key] = max(largest[key], float(p.detach().abs().max()))
                torch.testing.assert_close(ours[key], p.detach(), rtol=0, atol=1e-5 * largest[key])


def test_cosine_schedule_ends_at_zero_and_needs_num_steps() -> None:
    rule = RULES["sgd"](lr=0.1, schedule="cosine")
    params, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    state = rule.init_state(params)
    for step, moved in ((0, 0.1), (5, 0.05), (10, 0.0), (12, 0.0)):
        new, _ = rule.update(grads, params, state._replace(step=torch.tensor(step)), None, torch.tensor(10))
        torch.testing.assert_close(1 - new["w"], torch.full((2,), moved), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="num_steps"):
        rule.update(grads, params, state)
