"""The optimizers that the contract is tested on: torch.optim.AdamW as the control, and four rules.

Untrained rules hardly move: their steps are scaled until every step of every tensor shows in fp32.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES, Rule

LOSS = 0.5
SHAPES: tuple[tuple[int, ...], ...] = ((6, 5), (5,), (), (4, 3, 2, 2))

Params = list[nn.Parameter]


@dataclass(frozen=True)
class Case:
    """An optimizer under test.

    Args:
        rule: a name of `RULES`; "" is torch.optim.AdamW.
        config: of the rule.
        lr: a rate at which steps show.
        options: that the constructor needs.
        needs_loss: `step` is told the loss.
    """

    name: str
    rule: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    needs_loss: bool = False

    @property
    def learned(self) -> bool:
        return bool(self.rule)

    def make_rule(self) -> Rule:
        return RULES[self.rule](**self.config)

    def make(self, params: Any, **options: Any) -> Optimizer:
        """The optimizer for whatever torch takes as parameters; `options` come before the case's own, `rule` too."""
        options = {"lr": self.lr, "weight_decay": 0.0} | self.options | options
        if not self.learned:
            return torch.optim.AdamW(params, **options)
        rule = options.pop("rule", None) or self.make_rule()
        return LearnedOptimizer(params, rule, **options)

    def step(self, optimizer: Any, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """`step`, with the loss where the rule reads it."""
        if self.needs_loss and closure is None:
            options = {"loss": LOSS} | options
        return optimizer.step(closure, **options) if closure is not None else optimizer.step(**options)


CONTROL = Case("AdamW", lr=0.01)
LEARNED = (
    Case("lstm", "lstm", {"hidden": 4, "output_scale": 5.0}),
    Case("small_fc", "small_fc", {"hidden": 8, "step_mult": 0.1}),
    Case("celo2", "celo2", {"hidden": 8, "step_mult": 0.01, "adamw_mult": 2.0}),
    Case("velo", "velo", {"hidden": 8, "width": 8, "bank": 4}, options={"num_steps": 100}, needs_loss=True),
)
CASES = (CONTROL, *LEARNED)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_rule = pytest.mark.parametrize("case", LEARNED, ids=lambda case: case.name)


def draw(seed: int, *shape: int) -> Tensor:
    """Rows of very different scale, no element near zero."""
    generator = make_generator(seed)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    x = sign * (0.2 + torch.rand(shape, generator=generator, dtype=torch.float32))
    rows = 10 ** (2 * torch.rand(shape[:1], generator=generator, dtype=torch.float32) - 1)
    return x * rows.view(-1, *[1] * (len(shape) - 1)) if shape else x


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Params:
    return [nn.Parameter(draw(seed + i, *shape).to(dtype)) for i, shape in enumerate(shapes)]


def set_grads(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients of a step, always the same ones for the tensor at a place."""
    for i, p in enumerate(params):
        p.grad = (scale * draw(1000 + 100 * step + i, *p.shape)).to(p.dtype)


def run_steps(case: Case, optimizer: Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    """Steps on the gradients of `set_grads`."""
    for step in range(first, first + steps):
        set_grads(params, step)
        case.step(optimizer)


def clone(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def is_same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit and in their dtype (NaN equals NaN), through dicts and sequences."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        bytes_of = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return torch.equal(*bytes_of)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def assert_same(actual: Any, expected: Any) -> None:
    assert is_same(actual, expected)


def assert_moved(actual: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Every tensor that has elements is another one, and finite."""
    for a, b in zip(actual, before, strict=True):
        assert bool(torch.isfinite(a).all())
        assert not a.numel() or bool((a.detach() != b).any())


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor], start: Iterable[Tensor], rtol: float) -> None:
    """Relative to the largest movement from `start`, per tensor; rounding of the number itself is granted."""
    for a, b, s in zip(actual, expected, start, strict=True):
        a, b, s = (x.detach().double() for x in (a, b, s))
        assert a.shape == b.shape
        if a.numel():
            rounding = 4 * torch.finfo(torch.float32).eps * float(b.abs().max())
            assert float((a - b).abs().max()) <= rtol * float((b - s).abs().max()) + rounding


def copy_state(optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def make_model() -> nn.Module:
    """A small classifier whose parameters are all of their own scale."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=make_generator(index)) + 0.1)
    return model


def compute_loss(model: nn.Module, step: int, rows: slice = slice(None)) -> Tensor:
    """Cross-entropy on the batch of a step."""
    x = torch.randn(16, 5, generator=make_generator(50 + step))
    return F.cross_entropy(model(x[rows]).float(), x[rows, :3].argmax(1))


def follow_path(
    case: Case, steps: int, first: int = 0, saved: dict[str, Any] | None = None
) -> tuple[Params, Optimizer]:
    """A run, or from "optimizer" and "params" of `saved` the rest of one."""
    params = make_params()
    optimizer = case.make(params, weight_decay=0.01)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        for p, value in zip(params, saved["params"], strict=True):
            p.data.copy_(value)
    run_steps(case, optimizer, params, steps, first)
    return params, optimizer


def digest(params: Params, optimizer: Optimizer) -> str:
    """SHA-256 of all bits of parameters and state."""
    state = optimizer.state_dict()["state"]
    tensors = [*params, *(state[index][key] for index in sorted(state) for key in sorted(state[index]))]
    parts = (x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for x in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()
