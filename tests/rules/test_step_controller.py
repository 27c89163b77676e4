"""The step controller against its formulas, written down a second time in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopt.core.random import make_generator
from lopt.rules.building_blocks.step_controller import (
    FEATURES,
    Seen,
    StepController,
    describe_shapes,
    measure_step,
    multiply_step,
)
from lopt.rules.layout import find_layout
from lopt.rules.stages import Clock

Numbers = NDArray[np.float64]
SHAPES = [(6, 4), (5,), (3, 2, 2)]
T, STEP = 40, 7


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


def cosine(a: Numbers, b: Numbers) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_what_is_measured_of_a_step() -> None:
    old, g, v = draw(1, 4, 6), draw(2, 4, 6), draw(3, 4, 6).square() + 0.1
    m, root = 0.9 * old + 0.1 * g, v.sqrt()
    first, second = 1 - 0.9**3, 1 - 0.95**3
    unbias = (torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    step = (0.9 * m + 0.1 * g) / root
    products, norm = multiply_step(g, m, root, step)
    measured = measure_step(products, 0.81, unbias)
    before, r = old.numpy() / root.numpy(), root.numpy()
    expected = [
        cosine(g.numpy() / r, before),
        np.log(np.mean((m.numpy() / first) ** 2) / np.mean(v.numpy() / second)) / 4 + 0.75,
    ]
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-9)
    assert float(norm) == pytest.approx(float(step.norm()))


def test_before_the_first_step_nothing_is_said_of_its_agreement() -> None:
    g = draw(1, 2, 3)
    one = torch.ones((), dtype=torch.float64)
    measured = measure_step(multiply_step(g, 0.1 * g, g.abs(), 0.1 * g / g.abs())[0], 0.9, (0.1 * one, 0.05 * one))
    assert measured[0] == 0


def test_long_sums_do_not_take_rounding_for_an_agreement() -> None:
    g = torch.linspace(0.1, 1, 1 << 17, dtype=torch.float32)[None]
    products, _ = multiply_step(g, 0.1 * g, g, torch.full_like(g, 0.1))
    assert measure_step(products, 0.9, (torch.tensor(0.1), torch.tensor(0.05)))[0] == 0


def describe_by_hand(state: dict[str, Numbers], seen: dict[str, Numbers]) -> Numbers:
    """Features `[n, F]` from rows that have this step's averages in them."""
    n = len(SHAPES)
    sizes = np.array([np.prod(shape) for shape in SHAPES], dtype=np.float64)
    cosines = state["agreement"][:, 0]
    x = np.stack(
        [
            np.ones(n),
            np.full(n, 2 * STEP / T - 1),
            np.full(n, np.exp(-10 * STEP / T)),
            3 * cosines,
            np.full(n, 3 * (cosines * sizes / sizes.sum()).sum()),
            state["measured"][:, 1],
            np.clip(np.log(seen["rms"] / seen["scale"]), -2, 4) / 2,
        ],
        1,
    )
    assert x.shape[1] == len(FEATURES)
    return x


def test_an_open_run_counts_as_half_over() -> None:
    controller = StepController()
    with torch.no_grad():
        controller.direct.copy_(0.3 * draw(1, *controller.direct.shape))
    one, layouts = torch.ones(1), [find_layout((3, 3))]
    for step, plan in ((20, 300), (400, 800)):
        factors = []
        for num_steps in (None, 0, plan):
            rows = {key: x[None] for key, x in controller.start((), torch.zeros(1)).items()}
            clock = Clock(torch.tensor([step]), None if num_steps is None else torch.tensor([num_steps]))
            seen = Seen(one, one, describe_shapes(layouts, [1], one)[:, 1], clock)
            factors.append(controller(rows, seen)[1].item())
        assert factors[0] == factors[1] == factors[2] != 1


@pytest.mark.parametrize("size", [0.3, 3.0, 300.0], ids=["within", "step beyond", "gain beyond"])
def test_the_factor_is_that_of_the_formula(size: float) -> None:
    controller = StepController().double()
    with torch.no_grad():
        controller.direct.copy_(size * draw(1, *controller.direct.shape))
        controller.readout.copy_(size * draw(2, *controller.readout.shape))
    layouts, n = [find_layout(shape) for shape in SHAPES], len(SHAPES)
    rows = {
        "gain": 0.1 * draw(3, n, 1),
        "agreement": 0.2 * draw(4, n, 1),
        "measured": 0.2 * draw(5, n, 2),
    }
    scale, rms = (0.1 + draw(seed, n).abs() for seed in (7, 8))
    clock = Clock(torch.tensor([STEP]), torch.tensor([T]))
    shapes = describe_shapes(layouts, [1] * n, scale)[:, 1]
    with torch.no_grad():
        new, factor = controller(rows, Seen(scale, rms, shapes, clock))

    state = {key: value.numpy().copy() for key, value in rows.items()}
    state["agreement"] += max(0.1, 1 / (STEP + 1)) * (state["measured"][:, :1] - state["agreement"])
    x = describe_by_hand(state, {"rms": rms.numpy(), "scale": scale.numpy()})
    a, b, c = (w.detach().numpy() for w in (controller.direct, controller.hidden, controller.readout))
    step, rate = (x @ a.T + np.tanh(x @ b.T) @ c.T).T * np.array([[1.0], [0.5]])
    gain = np.clip(state["gain"][:, 0] + 0.5 * rate / (10 + 0.1 * T), -3, 3)
    assert (step.max() > 3, abs(gain).max() == 3) == (size > 1, size > 10)
    np.testing.assert_allclose(new["gain"][:, 0].numpy(), gain, rtol=1e-6)
    np.testing.assert_allclose(new["agreement"].numpy(), state["agreement"], rtol=1e-9)
    np.testing.assert_allclose(factor.numpy(), np.exp(np.clip(step + gain, -4, 3 + np.maximum(gain, 0))), rtol=1e-6)


def test_untrained_it_changes_nothing() -> None:
    controller, layouts = StepController(), [find_layout((3, 3))]
    rows = {key: x[None] for key, x in controller.start((), torch.zeros(1)).items()}
    one = torch.ones(1)
    seen = Seen(one, one, describe_shapes(layouts, [1], one)[:, 1], Clock(torch.tensor([0]), torch.tensor([9])))
    _, factor = controller(rows, seen)
    assert factor.tolist() == [1.0]
