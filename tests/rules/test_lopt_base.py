"""Base against its formula, written down a second time in numpy and float64."""

from __future__ import annotations

from math import cos, pi

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopt.core.random import make_generator
from lopt.rules import RULES, State, lopt_base
from lopt.rules.building_blocks.open_schedule import DECAY_POWER, DECAY_STEPS
from lopt.rules.lopt_base import LONGEST

HORIZON, SIZE, VECTOR, RELATIVE, DECAY, DEPTH = 9, 0.03, 0.2, 0.5, 0.1, 0.7
Matrix = NDArray[np.float64]


def draw(seed: int, *shape: int) -> Tensor:
    """Rows of very different scale, in float64."""
    generator = make_generator(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=torch.float64)


def find_signed_basis(x: Matrix) -> Matrix:
    """The orthogonal factor of a QR decomposition by Gram-Schmidt; signs, which LAPACK's may have, do not matter."""
    columns: list[Matrix] = []
    for column in x.T:
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            column = column - sum((q * (q @ column) for q in columns), np.zeros_like(column))
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, 1)


def step_by_hand(
    grads: list[Matrix], p: Matrix, depth: float, most: int | None, every: int, normalised: bool
) -> Matrix:
    """Where a matrix `[rows, columns]`, or a vector `[1, n]`, is after these gradients.

    Args:
        depth: number of matrices, or how many there are from one normalisation to the next.
        most: the largest number of rows or columns that have a basis together; None for a vector, which has none.
    """
    rows, columns = p.shape
    m, v = np.zeros_like(p), np.zeros_like(p)
    scale, active = np.sqrt(np.mean(p**2)), np.array([np.mean(g != 0) for g in grads])
    sides = [np.zeros((rows, rows)), np.zeros((columns, columns))]
    bases = [np.eye(rows), np.eye(columns)]
    absolute = SIZE / depth**DEPTH * (1 if rows > 1 else VECTOR)
    usual = (3 * columns) ** -0.5
    start = max(scale, usual) if normalised and rows > 1 else scale
    for t, g in enumerate(grads):
        m = 0.9 * m + 0.1 * g
        for i, product in enumerate((g @ g.T, g.T @ g)):
            sides[i] = 0.95 * sides[i] + 0.05 * product
            lines = g if i == 0 else g.T
            if most is None or not (t % every == 0 or t < 3) or np.mean((lines != 0).any(1)) < 0.5:
                continue
            count = -(-len(product) // most)
            size = -(-len(product) // count)
            for j in range(count):
                block = (slice(j * size, (j + 1) * size),) * 2
                moments, basis = sides[i][block], bases[i][block]
                relative = moments / np.trace(moments) + 0.003 * np.eye(len(basis))
                bases[i][block] = find_signed_basis(relative @ relative @ basis)
        left, right = bases
        v = 0.95 * v + 0.05 * (left.T @ g @ right) ** 2
        ahead = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1))
        u = left @ ((left.T @ ahead @ right) / np.sqrt(v / (1 - 0.95 ** (t + 1)) + 1e-24)) @ right.T
        now = min(absolute, RELATIVE * start / active[t]) * (1 + cos(pi * t / HORIZON)) / 2
        decay = DECAY * active[t] * now / max(scale, usual)
        p = p - now * u / np.sqrt(np.mean(u**2)) - (decay * p if rows > 1 else 0)
    return p


@pytest.mark.parametrize(("max_side", "gains"), [(256, 0), (5, 0), (3, 0), (256, 2)])
def test_steps_are_those_of_the_formula_in_numpy(max_side: int, gains: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lopt_base, "EAGER", 3)
    shapes = {
        "square": (4, 4),
        "wide": (4, 6),
        "window": (5, 2, 2),
        "vector": (7,),
        "column": (6, 1),
        "zero": (4, 4),
        "table": (6, 4),
        "small": (4, 5),
        "one": (1,),  # which is no gain of a normalisation, as it is alone
        **{f"gain {i}": (7,) for i in range(gains)},
    }
    sizes = {"size": SIZE, "vector": VECTOR, "relative": RELATIVE, "depth": DEPTH, "decay": DECAY, "init_std": 0.0}
    rule = RULES["base"](**sizes, max_side=max_side, every=4).double()
    start = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    start["zero"] = torch.zeros_like(start["zero"])
    start["small"] *= 1e-2
    for name in ("one", *(f"gain {i}" for i in range(gains))):
        start[name] = torch.ones_like(start[name])
    grads = [{name: draw(100 * t + i, *shape) for i, (name, shape) in enumerate(shapes.items())} for t in range(6)]
    for t, step in enumerate(grads):
        step["table"][[t % 3, 3, 4, *([5] if t else [])]] = 0  # rows that are not looked up: in time more than half
    params, state = start, rule.init_state(start)
    with torch.no_grad():
        for step in grads:
            params, state = rule.update(step, params, state, num_steps=torch.tensor(HORIZON))
    for name in set(shapes) - {"zero"}:
        matrix = name in ("square", "wide", "window", "table", "small")
        form = (shapes[name][0], -1) if matrix else (1, -1)
        history = [step[name].reshape(form).numpy() for step in grads]
        begin = start[name].reshape(form).numpy()
        expected = step_by_hand(history, begin, 6 / (1 + gains), max_side if matrix else None, 4, gains > 0)
        # The logarithms of the sizes are fp32.
        moved, by_hand = params[name].reshape(form).numpy() - begin, expected - begin
        np.testing.assert_allclose(moved, by_hand, rtol=0, atol=1e-6 * np.abs(by_hand).max())
    # A tensor that starts at 0 counts as one of size 0.1.
    assert 0 < float(params["zero"].square().mean().sqrt()) <= 6 * RELATIVE * 0.1


def test_nothing_moves_at_or_beyond_the_planned_end() -> None:
    rule, params = RULES["base"](), {"w": draw(1, 3, 3).float()}
    state = rule.init_state(params)
    with torch.no_grad():
        for step in (HORIZON, HORIZON + 5):
            late = State(torch.tensor(step), state.accumulators)
            new, _ = rule.update({"w": draw(2, 3, 3).float()}, params, late, num_steps=torch.tensor(HORIZON))
            torch.testing.assert_close(new["w"], params["w"], rtol=0, atol=1e-9)


def test_schedule_of_a_batch_of_planned_open_and_cooling_runs_is_that_of_numpy() -> None:
    """Runs of one batch: planned, open, one that cools down, one whose end is past, one whose cool-down begins now."""
    steps, ends, starts = np.array([5, 250, 130, 60, 40]), np.array([9, 0, 150, 50, 70]), np.array([0, 0, 110, 30, 40])
    opens = np.where(ends > 0, starts, steps)
    share = np.clip((steps - starts) / np.where(ends > 0, ends - starts, np.inf), 0, 1)
    expected = (1 + opens / DECAY_STEPS) ** -DECAY_POWER * (1 + np.cos(pi * share)) / 2
    rule, params = RULES["base"](size=SIZE, init_std=0.0).double(), {"w": draw(1, 5, 3, 3)}
    state = State(torch.from_numpy(steps), rule.init_state(params, batch_ndim=1).accumulators)
    state.accumulators["w"]["scale"].fill_(1e6)
    grads, planned = {"w": draw(2, 5, 3, 3)}, [torch.from_numpy(x) for x in (ends, starts)]
    with torch.no_grad():
        new, _ = rule.update(grads, params, state, None, *planned)
    moved = (new["w"] - params["w"]).square().mean((1, 2)).sqrt()
    np.testing.assert_allclose(moved.numpy(), SIZE * expected, rtol=1e-5, atol=1e-9 * SIZE)


def test_hidden_ends_are_as_no_plan_at_all_and_leave_derivatives_finite() -> None:
    rule, params = RULES["base"](), {"w": draw(1, 2, 3, 3).float()}
    state, grads = rule.init_state(params, batch_ndim=1), {"w": draw(2, 2, 3, 3).float()}
    for step in (0, 7):
        now = State(torch.full((2,), step), state.accumulators)
        hidden, _ = rule.update(grads, params, now, num_steps=torch.tensor([0, 20]))
        none, _ = rule.update(grads, params, now)
        planned, _ = rule.update(grads, params, now, num_steps=torch.tensor([20, 20]))
        assert torch.equal(hidden["w"][0], none["w"][0])
        assert torch.equal(hidden["w"][1], planned["w"][1])
        slopes = torch.autograd.grad(hidden["w"].sum(), list(rule.parameters()))
        assert all(bool(slope.isfinite().all()) for slope in slopes)


def test_vectors_move_as_matrices_do_where_there_are_none() -> None:
    rule, moved = RULES["base"](size=SIZE, vector=VECTOR, relative=1e3, init_std=0.0), {}
    for name, shapes in {"alone": [(7,)], "beside": [(7,), (3, 3)]}.items():
        params = {str(i): draw(i, *shape).float() for i, shape in enumerate(shapes)}
        with torch.no_grad():
            new, _ = rule.update(params, params, rule.init_state(params), num_steps=torch.tensor(HORIZON))
        moved[name] = float((new["0"] - params["0"]).square().mean().sqrt())
    assert moved["alone"] == pytest.approx(SIZE, rel=1e-5)
    assert moved["beside"] == pytest.approx(SIZE * VECTOR, rel=1e-5)


def test_long_sides_keep_blocks_and_sides_of_large_tables_nothing() -> None:
    """What is kept of a side grows with its length times a block's, and not with the length's square."""
    params = {"layer": torch.zeros(1000, 300), "table": torch.zeros(LONGEST + 1, 4)}
    kept = RULES["base"]().init_state(params).accumulators
    forms = {name: {key: tuple(x.shape) for key, x in acc.items() if "_" in key} for name, acc in kept.items()}
    left, right = (1000, 250, 1), (150, 1, 300)
    assert forms["layer"]["left_factor"] == forms["layer"]["left_basis"] == left
    assert forms["layer"]["right_factor"] == forms["layer"]["right_basis"] == right
    assert "left_factor" not in forms["table"]
    assert forms["table"]["right_factor"] == (4, 1, 4)
