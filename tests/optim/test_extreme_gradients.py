"""Any finite gradient: parameters and state stay finite, what is limited is counted, on every path of a step.

A rule sees entries within +-2^30 (`BOUND`). Right values are numpy's and torch.optim's in float64 on gradients that
were clamped to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lopt_kernels.launching.parameters import BOUND
from rule_cases import make_quick
from torch import nn

import lopt.optim.torch_backend.step
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.optim.update import ParameterUpdate
from lopt.rules import RULES
from lopt.rules.programs.registry import FUSED

SIZES = (1e-45, 1e-30, 1.0, 1e10, 1e19, 1e25, 1e38)
WIDE_SIZE = 1e60  # finite in fp64 alone
SHAPES = ((4, 3), (5,))
STEPS, SPIKE = 4, 1


class Extreme(NamedTuple):
    """One gradient of the matrix: how large, in one element or in all, in one step or in all."""

    size: float
    everywhere: bool
    always: bool

    def fill(self, p: nn.Parameter, i: int, step: int) -> None:
        """Set the gradient of a parameter, an ordinary one where it is not to be extreme."""
        dtype = torch.float64 if self.size == WIDE_SIZE else torch.float32
        g = torch.randn(p.shape, generator=make_generator(100 * step + i), dtype=dtype)
        if self.always or step == SPIKE:
            extreme = g.sign() * self.size
            g = extreme if self.everywhere else torch.where(torch.arange(g.numel()).view(g.shape) == 1, extreme, g)
        p.grad = g

    @property
    def count(self) -> int:
        """How many gradients of one parameter are limited in `STEPS` steps."""
        return (STEPS if self.always else 1) * (self.size > BOUND)


def make_params(extreme: Sequence[Extreme]) -> list[nn.Parameter]:
    """Two parameters for each."""
    params = []
    for i, (one, shape) in enumerate(product(extreme, SHAPES)):
        dtype = torch.float64 if one.size == WIDE_SIZE else torch.float32
        params.append(nn.Parameter(torch.randn(shape, generator=make_generator(i)).to(dtype)))
    return params


def set_gradients(params: Sequence[nn.Parameter], extreme: Sequence[Extreme], step: int) -> None:
    for i, (p, (one, _)) in enumerate(zip(params, product(extreme, SHAPES), strict=True)):
        one.fill(p, i, step)


def check_finite(name: str, extreme: Sequence[Extreme], **options: Any) -> LearnedOptimizer:
    """Steps of all these together leave everything finite, and what was limited has been counted."""
    params = make_params(extreme)
    optimizer = LearnedOptimizer(params, make_quick(name), num_steps=50, **options)
    for step in range(STEPS):
        set_gradients(params, extreme, step)
        optimizer.step(loss=1.0)
        assert all(bool(p.isfinite().all()) for p in params)
        for p, (one, _) in zip(params, product(extreme, SHAPES), strict=True):
            bad = [key for key, value in optimizer.state[p].items() if not bool(value.isfinite().all())]
            assert not bad, (one, bad)
    report = optimizer.report()
    assert report.limited == sum(one.count for one in extreme) * len(SHAPES)
    assert report.skipped == 0
    assert f"gradients limited: {report.limited}" in str(report)
    assert all(int(state["step"]) == STEPS for state in optimizer.state.values())
    return optimizer


every_rule = pytest.mark.parametrize("name", RULES)
MATRIX = [Extreme(*one) for one in product((*SIZES, WIDE_SIZE), (False, True), (False, True))]
FLOATS = [one for one in MATRIX if one.size != WIDE_SIZE]  # kernels take no fp64
FEW = [Extreme(1e38, False, False), Extreme(1e19, True, True), Extreme(1e-45, True, True)]


@every_rule
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
def test_any_finite_gradient_leaves_parameters_and_state_finite_and_is_counted(name: str, guard: bool) -> None:
    check_finite(name, MATRIX, guard=guard)


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize("one", MATRIX, ids=str)
def test_any_finite_gradient_of_a_whole_model_leaves_it_finite(name: str, guard: bool, one: Extreme) -> None:
    check_finite(name, [one], guard=guard)


KERNELS = [("adamw", FEW), ("small_fc", FEW), *(pytest.param(name, FLOATS, marks=pytest.mark.slow) for name in FUSED)]


@pytest.mark.parametrize(("name", "extreme"), KERNELS)
def test_any_finite_gradient_in_a_step_by_kernels_leaves_everything_finite(
    name: str, extreme: Sequence[Extreme]
) -> None:
    """That kernels limit as torch's operations do, in every rule, is in `test_fused`."""
    pytest.importorskip("triton")
    assert check_finite(name, extreme, backend="triton").backend.name == "triton"


@pytest.mark.parametrize("name", ["adamw", "small_fc", "velo"])
def test_masked_steps_limit_and_count_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that is not waited for."""
    monkeypatch.setattr(lopt.optim.torch_backend.step, "is_readable", lambda x: False)
    check_finite(name, MATRIX)


# -- right values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unscale", [None, 2.0**-40], ids=["", "scaled"])
@pytest.mark.parametrize("sanitize", [False, True], ids=["", "sanitized"])
def test_rule_sees_the_gradient_that_numpy_limits(dtype: torch.dtype, unscale: float | None, sanitize: bool) -> None:
    values = [*SIZES, WIDE_SIZE, 2.0**30, 2.0**71, *([torch.inf, torch.nan] if sanitize else [])]
    g = torch.tensor([sign * x for x in values for sign in (1, -1)], dtype=torch.float64).to(dtype)
    g = g if sanitize else g[g.isfinite()]
    exact = g.double().numpy()
    exact = np.where(np.isfinite(exact), exact, 0.0) * (unscale or 1.0)
    expected = torch.from_numpy(-np.clip(exact, -(2.0**30), 2.0**30).astype(np.float32))
    factor = None if unscale is None else torch.tensor(unscale, dtype=torch.float32)
    seen = ParameterUpdate(1.0, 0.0, maximize=True, unscale=factor, sanitize=sanitize).read(g)
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_within_the_bound_is_seen_bit_for_bit(dtype: torch.dtype) -> None:
    g = torch.randn(1000, generator=make_generator(0), dtype=torch.float64) * 10 ** torch.linspace(-44, 8, 1000)
    g = g.to(dtype)
    g = g[g.isfinite()]
    assert torch.equal(ParameterUpdate(1.0, 0.0).read(g), g.float())


TORCHS: dict[str, partial[torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "nadamw": partial(torch.optim.NAdam, lr=1e-3, weight_decay=1e-2, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("name", TORCHS)
def test_steps_are_torchs_in_float64_on_the_limited_gradient(name: str) -> None:
    make = TORCHS[name]
    params, exact = make_params(MATRIX), [nn.Parameter(p.detach().double()) for p in make_params(MATRIX)]
    options = {key: value for key, value in make.keywords.items() if key in ("lr", "weight_decay")}
    optimizer, torchs = LearnedOptimizer(params, RULES[name](**options)), make(exact)
    path = [[p.detach().clone() for p in exact]]
    for step in range(STEPS):
        set_gradients(params, MATRIX, step)
        for p, q in zip(params, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double().clamp(-(2.0**30), 2.0**30)
        optimizer.step()
        torchs.step()
        path.append([q.detach().clone() for q in exact])
    for p, *points in zip(params, *path, strict=True):
        # A step far away and back is rounded where it was farthest.
        rounding = STEPS * torch.finfo(torch.float32).eps * max(float(q.abs().max()) for q in points)
        moved = float((points[-1] - points[0]).abs().max())
        assert float((p.detach().double() - points[-1]).abs().max()) <= 1e-5 * moved + rounding


# -- what is unscaled, sanitized, guarded ----------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "small_fc"])
def test_gradient_is_limited_after_its_scale_is_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 2^20 makes gradients of 2^40 of ordinary ones; they are stepped to the bit as if it were not there."""
    ends = []
    for scale in (1.0, 2.0**20):
        params = make_params([Extreme(1.0, True, False)])
        optimizer = LearnedOptimizer(params, make_quick(name), capturable=True)
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        for p in params:
            p.grad = torch.linspace(-(2.0**20), 2.0**20, p.numel()).view(p.shape) * scale
        optimizer.step()
        assert optimizer.report().limited == 0
        params[0].grad[0, 0] = 2.0**31 * scale  # type: ignore[index]
        optimizer.step()
        assert optimizer.report().limited == 1
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_sanitized_gradient_keeps_what_is_finite_in_its_own_dtype() -> None:
    """In fp64 1e60 is a number, and only NaN and infinity count as 0."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = LearnedOptimizer([p], RULES["sgd"](lr=1.0), nonfinite="sanitize")
    p.grad = torch.tensor([1e60, torch.inf, torch.nan, 1.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [-(2.0**30), 0.0, 0.0, -1.0]
    assert optimizer.report().limited == 1


@pytest.mark.parametrize("guard", [False, True], ids=["group", "guard"])
def test_adamw_beside_a_rule_has_the_moments_of_the_limited_gradient(guard: bool) -> None:
    p = nn.Parameter(torch.zeros(3))
    groups = [{"params": [p]} | ({} if guard else {"rule": "adamw"})]
    optimizer = LearnedOptimizer(groups, make_quick("small_fc"), guard=guard)
    p.grad = torch.tensor([3e38, -1e20, 2.0])
    optimizer.step(loss=1.0)
    limited = np.clip(p.grad.double().numpy(), -(2.0**30), 2.0**30)
    m, v = (optimizer.state[p][("guard_" if guard else "") + key].double().numpy() for key in "mv")
    np.testing.assert_allclose(m, 0.1 * limited, rtol=1e-6)
    np.testing.assert_allclose(v, 0.001 * limited**2, rtol=1e-4)


# -- the parameter's own range ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_step_of_a_half_stays_within_its_range(backend: str) -> None:
    """torch's optimizers make it infinite, for good."""
    if backend == "triton":
        pytest.importorskip("triton")
    p = nn.Parameter(torch.tensor([65000.0, -65000.0, 1.0], dtype=torch.float16))
    optimizer = LearnedOptimizer([p], RULES["adamw"](lr=1e4, weight_decay=0.0), backend=backend)
    p.grad = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float16)
    optimizer.step()
    assert p.tolist() == [65504.0, -65504.0, 1.0]
    p.grad = -p.grad
    for _ in range(30):
        optimizer.step()
    assert p[0] < 65504.0
    assert p[1] > -65504.0
