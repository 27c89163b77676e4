"""Rules against recorded trajectories of independent implementations (tests/cases/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.rules import Rule
from lopt.rules.released import import_rule

GOLDEN = Path(__file__).parents[1] / "cases" / "golden"
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


def build(name: str, dtype: torch.dtype = torch.float32) -> Rule:
    """The rule of a golden file, its meta-weights read as the importer reads released ones."""
    rule = import_rule(GOLDEN / f"{name}.npz", *FILES[name])
    return rule.to(dtype)


FILES: dict[str, tuple[str, dict[str, object]]] = {
    "small_fc_h4_l2": ("small_fc", {}),
    "small_fc_h32_l1": ("small_fc", {}),
    "mlp_lopt": ("mlp", {}),
    "celo2": ("celo2", {"step_mult": 0.01, "route": False}),
    "celo2_base": ("celo2_base", {"step_mult": 0.01}),
    "velo_h16_b8": ("velo", {}),
}
TOLERANCE = 2e-5  # of the movement, in each step
RUNS = [(name, case) for name in list(FILES)[:-1] for case in CASES if not (case == "scalar" and "celo2" in name)]


def share_of_bound(ours: list[Tensor], theirs: Tensor, start: Tensor) -> float:
    """Largest error of the movement so far over all steps, as a share of what is allowed.

    Allowed is `TOLERANCE` of the movement, for the order of summation within a step, and what storing parameters in
    fp32 does: half a spacing per step, in their trajectory and in ours.
    """
    shares = []
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        moved = (other.double() - start.double()).norm()
        spacing = (torch.nextafter(other.abs(), torch.tensor(torch.inf)) - other.abs()).double().norm()
        shares.append(float((mine.double() - other.double()).norm() / (TOLERANCE * moved + step * spacing)))
    return max(shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "case"), RUNS)
def test_rule_reproduces_the_recorded_trajectory(name: str, case: str, dtype: torch.dtype) -> None:
    golden = read(name)
    rule = build(name, dtype)
    start = to_torch_layout(golden[f"{case}/p0"])
    params = {"p": start.to(dtype)}
    state, found = rule.init_state(params), []
    for g in to_torch_layout(golden[f"{case}/grads"], 1):
        params, state = rule.update({"p": g.to(dtype)}, params, state)
        found.append(params["p"].detach().float())
        params = {"p": found[-1].to(dtype)}  # the recorded parameters were rounded to fp32, too
    assert share_of_bound(found, to_torch_layout(golden[f"{case}/p"], 1), start) < 1


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_learned_optimizer_reproduces_the_recorded_trajectory(name: str, case: str) -> None:
    golden = read(name)
    start = to_torch_layout(golden[f"{case}/p0"])
    p = nn.Parameter(start.clone())
    optimizer, found = LearnedOptimizer([p], build(name)), []
    for g in to_torch_layout(golden[f"{case}/grads"], 1):
        p.grad = g
        optimizer.step()
        found.append(p.detach().clone())
    assert share_of_bound(found, to_torch_layout(golden[f"{case}/p"], 1), start) < 1


# -- VeLO: all tensors at once, and the loss -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_velo_reproduces_the_recorded_trajectory(dtype: torch.dtype) -> None:
    golden, rule = read("velo_h16_b8"), build("velo_h16_b8", dtype)
    starts = {case: to_torch_layout(golden[f"all/{case}/p0"]) for case in CASES}
    params = {case: p.to(dtype) for case, p in starts.items()}
    state, found = rule.init_state(params), []
    for step, loss in enumerate(golden["all/loss"]):
        grads = {case: to_torch_layout(golden[f"all/{case}/grads"], 1)[step].to(dtype) for case in CASES}
        params, state = rule.update(grads, params, state, torch.tensor(loss, dtype=dtype), torch.tensor(NUM_STEPS))
        found.append({case: p.detach().float() for case, p in params.items()})
        params = {case: p.to(dtype) for case, p in found[-1].items()}
    for case in CASES:
        recorded = to_torch_layout(golden[f"all/{case}/p"], 1)
        assert share_of_bound([p[case] for p in found], recorded, starts[case]) < 1


def test_velo_reproduces_the_recorded_trajectory_as_an_optimizer() -> None:
    golden = read("velo_h16_b8")
    starts = {case: to_torch_layout(golden[f"all/{case}/p0"]) for case in CASES}
    params = {case: nn.Parameter(p.clone()) for case, p in starts.items()}
    optimizer, found = LearnedOptimizer(params.items(), build("velo_h16_b8"), num_steps=NUM_STEPS), []
    for step, loss in enumerate(golden["all/loss"]):
        for case, p in params.items():
            p.grad = to_torch_layout(golden[f"all/{case}/grads"], 1)[step]
        optimizer.step(loss=float(loss))
        found.append({case: p.detach().clone() for case, p in params.items()})
    for case in CASES:
        recorded = to_torch_layout(golden[f"all/{case}/p"], 1)
        assert share_of_bound([p[case] for p in found], recorded, starts[case]) < 1
