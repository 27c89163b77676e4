"""Rules against recorded trajectories of independent implementations (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.rules import RULES, Rule

GOLDEN = Path(__file__).parent / "golden"
CASES = ["matrix_7x5", "matrix_5x9", "square_6x6", "conv_hwio_3x3x4x8", "vector_6", "scalar"]
NUM_STEPS = 100


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def to_torch_layout(x: np.ndarray, batch_ndim: int = 0) -> Tensor:
    """(in, out) -> (out, in); (spatial..., in, out) -> (out, in, spatial...)."""
    axes, ndim = list(range(batch_ndim)), x.ndim - batch_ndim
    order = list(range(ndim)) if ndim < 2 else [ndim - 1, ndim - 2, *range(ndim - 2)]
    return torch.from_numpy(x.transpose(axes + [batch_ndim + i for i in order]).copy())


def load_mlp(rule: Rule, golden: dict[str, np.ndarray], prefix: str, weight: str, bias: str) -> None:
    """Layers stored (in, out) into `w1`, `b1`, ..."""
    i = 0
    while f"{prefix}{weight.format(i)}" in golden:
        getattr(rule, f"w{i + 1}").data = torch.from_numpy(golden[f"{prefix}{weight.format(i)}"].T.copy())
        getattr(rule, f"b{i + 1}").data = torch.from_numpy(golden[f"{prefix}{bias.format(i)}"])
        i += 1


def build_small_fc(golden: dict[str, np.ndarray]) -> Rule:
    hidden, layers = golden["theta/nn/~/w0"].shape[1], sum("nn/~/w" in key for key in golden) - 1
    rule = RULES["small_fc"](hidden=hidden, hidden_layers=layers)
    load_mlp(rule, golden, "theta/nn/~/", "w{}", "b{}")
    for ours, theirs in (("momentum", "momentum"), ("second", "rms"), ("factored", "adafactor")):
        getattr(rule, f"{ours}_offsets").data = torch.from_numpy(golden[f"theta/{theirs}_decays"])
    return rule


BUILDERS: dict[str, Callable[[dict[str, np.ndarray]], Rule]] = {
    "small_fc_h4_l2": build_small_fc,
    "small_fc_h32_l1": build_small_fc,
}
TOLERANCE = 1e-4
FILES = [(name, case) for name in BUILDERS for case in CASES if not (case == "scalar" and "celo2" in name)]


def movement_error(ours: list[Tensor], theirs: Tensor, start: Tensor) -> float:
    """Largest relative error of the movement so far, over all steps."""
    errors = []
    for mine, other in zip(ours, theirs, strict=True):
        moved = (other.double() - start.double()).norm()
        errors.append(float((mine.double() - other.double()).norm() / moved))
    return max(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "case"), FILES)
def test_rule_reproduces_the_recorded_trajectory(name: str, case: str, dtype: torch.dtype) -> None:
    golden = read(name)
    rule = BUILDERS[name](golden).to(dtype)
    start = to_torch_layout(golden[f"{case}/p0"])
    params = {"p": start.to(dtype)}
    state, found = rule.init_state(params), []
    for g in to_torch_layout(golden[f"{case}/grads"], 1):
        params, state = rule.update({"p": g.to(dtype)}, params, state)
        found.append(params["p"].detach())
    error = movement_error(found, to_torch_layout(golden[f"{case}/p"], 1), start)
    assert error < TOLERANCE


@pytest.mark.parametrize(("name", "case"), FILES)
def test_learned_optimizer_reproduces_the_recorded_trajectory(name: str, case: str) -> None:
    golden = read(name)
    start = to_torch_layout(golden[f"{case}/p0"])
    p = nn.Parameter(start.clone())
    optimizer, found = LearnedOptimizer([p], BUILDERS[name](golden)), []
    for g in to_torch_layout(golden[f"{case}/grads"], 1):
        p.grad = g
        optimizer.step()
        found.append(p.detach().clone())
    error = movement_error(found, to_torch_layout(golden[f"{case}/p"], 1), start)
    assert error < TOLERANCE
