"""Streams: concepts that drift as they say, and losses that are recorded before anything is learned from a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lopt.core.random import derive_seeds
from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.curves import run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS, Batch, Task, TaskFamily

SEEDS = derive_seeds(0, "task", torch.arange(6))


def see(family: TaskFamily, tasks: Task, step: int) -> Task:
    return family.drift(tasks, torch.full((len(SEEDS),), step))


def walk(name: str, steps: range, **options: int) -> torch.Tensor:
    """What the stream's weights are at each of the steps, `[n, T, inputs]`."""
    family = TASKS[name](**options)
    tasks = family.sample_all(SEEDS)
    return torch.stack([see(family, tasks, step)["now"] for step in steps]).double()


def test_tracking_flips_one_of_the_relevant_signs_each_period() -> None:
    signs = walk("tracking", range(0, 400, 20))
    assert ((signs != 0).sum(-1) == 5).all()
    assert ((signs[1:] != signs[:-1]).sum(-1) == 1).all()
    assert torch.equal((signs[0] != 0), (signs[-1] != 0))
    within = walk("tracking", range(20, 40))
    assert (within == within[0]).all()


def test_a_stream_goes_back_at_the_end_of_its_path() -> None:
    signs = walk("tracking", range(40), flips=3, period=2)
    assert torch.equal(signs[:6], signs[12:18])
    assert torch.equal(signs[:8].view(4, 2, 6, 20)[:, 0], signs[6:14].view(4, 2, 6, 20)[:, 0].flip(0))


def test_random_walk_keeps_its_variance_and_has_two_speeds() -> None:
    family = TASKS["random_walk"](inputs=50, slow=0.01, fast=0.3, switch=50, length=1000)
    path = family.sample_all(SEEDS)["path"]
    assert path.square().sum(-1).mean(1).sub(1).abs().max() < 0.15
    moved = (path[:, 1:] - path[:, :-1]).square().sum(-1).sqrt()
    assert ((moved < 0.03) | (moved > 0.15)).all()
    changes = ((moved[:, 1:] < 0.1) != (moved[:, :-1] < 0.1)).sum(1)
    assert 10 <= changes.double().mean() <= 30


def test_rotating_classes_turn_by_their_speed() -> None:
    family = TASKS["rotating"](classes=2, std=0.01, batch_size=40)
    tasks = family.sample_all(SEEDS)
    for step in (0, 37):
        batch = family.batch(see(family, tasks, step), SEEDS)
        turns = torch.atan2(batch["x"][..., 1], batch["x"][..., 0]).double() / (2 * torch.pi)
        expected = tasks["phase"] + step * tasks["speed"]
        error = turns - expected[:, None] - batch["y"] / 2
        assert (error - error.round()).abs().max() < 0.02


def test_digits_are_permuted_anew_each_period() -> None:
    family = TASKS["permuted_digits"](period=10)
    tasks = family.sample_all(SEEDS)
    orders = [see(family, tasks, step)["order"] for step in (0, 9, 10)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    assert all((order.sort(-1).values == torch.arange(64)).all() for order in orders)
    first, other = (family.batch(see(family, tasks, step), SEEDS)["x"] for step in (0, 10))
    assert torch.equal(first.sort(-1).values, other.sort(-1).values)


@pytest.mark.parametrize("name", ["tracking", "random_walk", "rotating", "permuted_digits"])
def test_batches_that_are_drawn_ahead_are_those_of_their_steps(name: str) -> None:
    family = TASKS[name](**({"flips": 2, "period": 3} if name == "tracking" else {}))
    loop = InnerLoop(RULES["sgd"](lr=0.01), family, seed=0)
    slots = loop.start(torch.arange(3), stagger=True)
    slots = slots._replace(step=torch.tensor([0, 5, 2]))
    ahead = loop.batches(slots, 7)
    for step, batches in enumerate(ahead, 1):
        alone: Batch = loop.batch(slots._replace(step=slots.step + step))
        assert all(torch.equal(x, alone[key]) for key, x in batches["train"].items())
    assert len(ahead) == 7


def test_recorded_losses_are_those_of_the_next_batch_before_it_is_learned_from() -> None:
    # LMS by hand, on the batches of the loop: w <- w + 2 lr (y - w x) x.
    family = TASKS["tracking"](period=4)
    loop = InnerLoop(RULES["sgd"](lr=0.015), family, seed=0)
    slots = loop.start(torch.arange(2))
    losses = loop.unroll(slots, 30, restart=False).losses.detach()
    w = np.zeros((2, 20))
    for step in range(31):
        batch = loop.batch(slots._replace(step=torch.full((2,), step)))
        x, y = (batch[key][:, 0].double().numpy() for key in ("x", "y"))
        error = y - (w * x).sum(-1)
        expected = slots.loss if step == 0 else losses[step - 1]
        np.testing.assert_allclose(expected.numpy(), error**2, rtol=1e-3, atol=1e-6)
        w += 0.03 * error[:, None] * x


def test_tuned_lms_tracks_as_in_an_independent_measurement() -> None:
    # 3.41 +- .02 with a rate of .03 on the error, that is .015 on the squared error.
    curves = run_curves(RULES["sgd"](lr=0.015), TASKS["tracking"](), torch.arange(20), 1000)
    assert float(curves.losses[200:].mean()) == pytest.approx(3.41, abs=0.12)


@pytest.mark.parametrize("name", ["truncated", "pes"])
def test_meta_gradient_of_a_stream_does_not_depend_on_how_far_batches_are_drawn_ahead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate() -> Params:
        family = TASKS["tracking"](period=3, horizon=12)
        estimator = ESTIMATORS[name](num_steps=6)
        loop = InnerLoop(RULES["sgd"](lr=0.01), family, seed=0)
        return estimator.estimate(loop, estimator.start(loop, torch.arange(4))).gradient

    together = estimate()
    monkeypatch.setattr("lopt.meta.unroll.draws.DRAWN_NUMBERS", 1)
    for key, x in estimate().items():
        assert torch.equal(x, together[key])
