"""`gradient_memory` against its formula, written down a second time in numpy and float64."""

from __future__ import annotations

from math import cos, exp, pi
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import lopt
from lopt.core.random import make_generator
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES
from lopt.rules.gradient_memory import GradientMemory
from lopt.tasks import TASKS

Numbers = NDArray[np.float64]
STEPS, T = 6, 10


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


def make_rule(**options: Any) -> GradientMemory:
    """A rule of which no meta-weight is at its start."""
    rule = GradientMemory(**options).double()
    with torch.no_grad():
        for i, weight in enumerate(rule.parameters()):
            weight += 0.3 * draw(10 + i, *weight.shape)
    return rule


def step_by_hand(rule: GradientMemory, grads: list[Numbers], p: Numbers) -> Numbers:
    """The parameters after as many steps as there are gradients."""
    weights = {name: w.detach().numpy() for name, w in rule.named_parameters()}
    decay = 1 / (1 + exp(-weights["second_decay_logit"]))
    v, tokens = np.zeros_like(p), [np.zeros_like(p)] * rule.length
    for t, g in enumerate(grads):
        v = decay * v + (1 - decay) * g * g
        n = g / (np.sqrt(v / (1 - decay ** (t + 1))) + 1e-8)
        likeness = np.mean([(n * old).mean() for old in tokens])
        tokens = [n, *tokens[:-1]]
        found = np.zeros_like(p)
        for scores, heat, mix in zip(weights["age_scores"], weights["heat"], weights["mix"], strict=True):
            known = min(t + 1, rule.length)
            e = np.exp([scores[j] + heat * (n * tokens[j]).mean() for j in range(known)])
            found += mix * sum(a * x for a, x in zip(e / e.sum(), tokens, strict=False))
        features = [np.log(np.sqrt((p * p).mean())), float(p.ndim == 1), likeness, t / T, exp(-t / 5)]
        size = exp(min(0.0, weights["log_size"] + weights["weights"] @ features)) * (1 + cos(pi * t / T)) / 2
        p = p - size * found
    return p


@pytest.mark.parametrize("shape", [(3, 4), (5,)])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_steps_are_those_of_the_formula(shape: tuple[int, ...], length: int) -> None:
    rule = make_rule(length=length, heads=3)
    scale = torch.logspace(-2, 2, shape[-1], dtype=torch.float64)
    grads = [scale * draw(step, *shape) for step in range(STEPS)]
    params = {"w": draw(9, *shape)}
    expected = step_by_hand(rule, [g.numpy() for g in grads], params["w"].numpy())
    state = rule.init_state(params)
    with torch.no_grad():
        for g in grads:
            params, state = rule.update({"w": g}, params, state, num_steps=torch.tensor(T))
    torch.testing.assert_close(params["w"], torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_a_head_with_heat_looks_at_gradients_like_the_newest() -> None:
    """Two kinds of gradients in turn: what a head finds is the newest one's kind, whatever its age."""
    rule = GradientMemory(length=4, heads=1).double()
    kinds = [draw(1, 4, 5), draw(2, 4, 5)]
    with torch.no_grad():
        rule.age_scores.zero_()
        found = []
        for heat in (0.0, 30.0):
            rule.heat.fill_(heat)
            params = {"w": torch.ones(4, 5, dtype=torch.float64)}
            state = rule.init_state(params)
            for step in range(4):
                before = params["w"]
                params, state = rule.update({"w": kinds[step % 2]}, params, state)
            memory = state.accumulators["w"]["memory"]
            newest, other = memory[0] + memory[2], memory[1] + memory[3]
            # Shares of both kinds in the step, by least squares.
            moved = (before - params["w"]).flatten()
            basis = torch.stack([newest.flatten(), other.flatten()], 1)
            found.append(torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0])
    torch.testing.assert_close(found[0][0], found[0][1])
    assert found[1][1].abs() < 1e-6 * found[1][0]


def test_nothing_moves_at_the_end_of_a_planned_run() -> None:
    rule, params = make_rule(), {"w": draw(1, 3, 4)}
    state = rule.init_state(params)
    state = state._replace(step=torch.tensor(T))
    with torch.no_grad():
        new, _ = rule.update({"w": draw(2, 3, 4)}, params, state, num_steps=torch.tensor(T))
    assert torch.equal(new["w"], params["w"])


def test_the_shipped_rule_ends_below_tuned_adam_on_a_width_that_it_was_not_trained_on() -> None:
    """Adam has the learning rate and schedule that `python -m bench widths` found on other tasks of this width."""
    family, seeds = TASKS["conv"](width=4), torch.arange(4)
    ours, adam = (
        run_curves(rule, family, seeds, 200).final.mean()
        for rule in (lopt.load("conv-memory"), RULES["adam"](lr=0.0625, schedule="cosine"))
    )
    assert ours < 0.8 * adam


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length must be from 1 to 1024, got 0"),
        ({"length": 10**9}, "length must be from 1 to 1024"),
        ({"heads": 65}, "heads must be from 1 to 64, got 65"),
        ({"size": 0.0}, "size must be above 0, got 0"),
        ({"decay": 1.0}, "decay must be between 0 and 1, got 1"),
        ({"second_decay": float("nan")}, "second_decay must be between 0 and 1, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradientMemory(**options)
