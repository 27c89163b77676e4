"""Parameters, gradients and runs of the tests of steps by kernels (conftest.py: the interpreter)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.optim.triton_backend.step import FusedStep
from lopt.rules import RULES, Rule
from lopt.rules.programs.registry import FUSED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES: dict[str, dict[str, Any]] = {  # in place of quick ones: the interpreter is slow, and tiles have edges
    "celo": {"hidden": 2, "width": 4},
    "celo2": {"hidden": 3},
    "celo2_base": {"hidden": 3},
    "lstm": {"hidden": 2},
    "mlp": {"hidden": 3},
    "rnnprop": {"hidden": 3},
    "small_fc": {"hidden": 16},  # a tile, for tensor cores
    "velo": {"hidden": 1, "width": 4, "bank": 2},
}
SHAPES = [(), (5,), (3, 20), (20, 3), (4, 3, 2, 2), (2, 300), (3, 3, 2, 5), (0, 3), (5,)]
STEPS = 3
TOLERANCE = 3e-5  # of the movement; orthogonalisation lifts small directions, see CLOSE
CLOSE = {"celo2": 1e-4}

each_rule = pytest.mark.parametrize("name", list(FUSED))
QUICK = ("adamw", "lstm", "small_fc", "celo")  # of the wider tests
some_rules = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FUSED]
)
few_rules = pytest.mark.parametrize("name", ["adamw", "rnnprop", "small_fc"])


def make_rule(name: str) -> Rule:
    rule = RULES[name](**SIZES.get(name, RULES[name].quick_config))
    with torch.no_grad():
        for i, weight in enumerate(w for w in rule.parameters() if w.ndim):
            weight += 0.02 * torch.randn(weight.shape, generator=make_generator(i))
    return rule


def draw_start(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=make_generator(i)).to(DEVICE, dtype) for i, shape in enumerate(shapes)]


def draw_grad(p: Tensor, i: int, step: int) -> Tensor:
    """Rows differ in scale by orders."""
    generator = make_generator(1000 * step + i)
    rows = 10 ** torch.randn(p.shape[:1] + (1,) * (p.ndim - 1) if p.ndim else (), generator=generator)
    return (rows * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def run(
    start: list[Tensor],
    name: str,
    backend: str,
    steps: int = STEPS,
    change: Callable[[int, list[nn.Parameter]], None] = lambda step, params: None,
    first: LearnedOptimizer | None = None,
    g_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Parameters after some steps, and the optimizer; with `first`, after as many steps that it has made."""
    params = [nn.Parameter(clone(p)) for p in start]
    if g_dtype is not None:
        for p in params:
            p.grad_dtype = g_dtype
    options = {"lr": 1.0 if name.startswith("celo2") else 10.0, "weight_decay": 1e-3, "num_steps": 20} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = LearnedOptimizer(params, make_rule(name), backend=backend, **options)
    if first is not None:
        optimizer.load_state_dict(first.state_dict())
    begin = 0 if first is None else steps
    for step in range(begin, begin + steps):
        for i, p in enumerate(params):
            p.grad = draw_grad(p, i, step).to(g_dtype or p.dtype)
        change(step, params)
        optimizer.step(loss=0.5 + 0.1 * step)
    return [p.detach() for p in params], optimizer


def clone(p: Tensor) -> Tensor:
    """A copy with the same strides, and with NaN in the gaps."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0
    return torch.full((size,), torch.nan, dtype=p.dtype, device=p.device).as_strided(p.shape, p.stride()).copy_(p)


def assert_same(start: list[Tensor], name: str, tolerance: float | None = None, **options: Any) -> LearnedOptimizer:
    """Both backends make the same of `start`; returns the fused one."""
    want, torchs = run(start, name, "torch", **options)
    got, fused = run(start, name, "triton", **options)
    assert fused.backend.name == "triton"
    assert list_steps(fused)
    assert fused.report() == torchs.report()
    assert_close(got, want, start, CLOSE.get(name, TOLERANCE) if tolerance is None else tolerance)
    assert_states(fused, torchs)
    return fused


def list_steps(optimizer: LearnedOptimizer) -> list[FusedStep]:
    """The steps by kernels whose tables are kept."""
    return [step for replica in optimizer.replicas if replica.kernels is not None for step in replica.kernels.steps]


def assert_close(got: list[Tensor], want: list[Tensor], start: list[Tensor], tolerance: float) -> None:
    for a, b, p in zip(got, want, start, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == p.stride()
        moved = torch.linalg.vector_norm(b.double() - p.double())
        assert moved > 0 or not p.numel()
        rounding = torch.finfo(b.dtype).eps * torch.linalg.vector_norm(b.double()) / 2  # every element, once
        assert rounding < 0.05 * moved or not p.numel(), "the tolerance must not hide the step"
        assert torch.linalg.vector_norm(a.double() - b.double()) <= tolerance * moved + rounding


def assert_states(left: LearnedOptimizer, right: LearnedOptimizer, tolerance: float = 1e-4) -> None:
    states = [optimizer.state_dict()["state"] for optimizer in (left, right)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for key, value in state.items():
            other = states[1][index][key]
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            error = torch.linalg.vector_norm(value.double() - other.double())
            assert error <= tolerance * torch.linalg.vector_norm(other.double()), key
