"""Families made from other families."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
from task_cases import draw_tasks
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import stack_trees
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.rules import RULES
from lopt.tasks import TASKS, RandomScaling, TaskFamily
from lopt.tasks.transforms import TRANSFORMS, GradientNoise, LossScaling, ReducedBatch, StaleGradients, Transform

SMALL = {"width": 3, "batch_size": 16}


def test_scaled_task_is_the_same_problem_in_other_units() -> None:
    inner = TASKS["quadratic"]()
    scaled = RandomScaling(inner, 3.0)
    tasks, params, batch = draw_tasks(scaled, 2)
    factors = tasks["coordinate_scale"]
    assert factors.max() > 3
    assert factors.min() < 0.3
    plain = {"x": params["x"] * factors}
    expected = vmap(inner.loss)(plain, {k: b for k, b in batch.items() if k != "coordinate_scale"})
    torch.testing.assert_close(vmap(scaled.loss)(params, batch), expected, rtol=1e-6, atol=0)
    assert plain["x"].abs().max() < 0.1  # starts where the inner family starts


def test_element_factors_are_what_they_were_before_there_were_levels() -> None:
    family = RandomScaling(TASKS["quadratic"](), 3.0)
    generator = make_generator(5)
    TASKS["quadratic"]().sample(generator)
    expected = ((torch.rand(10, generator=generator) * 2 - 1) * 3.0).exp()
    assert torch.equal(family.sample(make_generator(5))["coordinate_scale"], expected)


@pytest.mark.parametrize(("level", "units"), [("global", 1), ("tensor", 4), ("element", 237)])
def test_a_level_has_that_many_units(level: str, units: int) -> None:
    family = RandomScaling(TASKS["mlp"](**SMALL), level=level)
    scale = family.sample(make_generator(0))["coordinate_scale"]
    assert len(scale) == family.spec.size
    parts = [p.unique() for p in family.spec.unflatten(scale).values()]
    assert torch.cat(parts).unique().numel() == pytest.approx(units, abs=2)  # float32 draws may coincide
    if level != "element":
        assert all(len(part) == 1 for part in parts)


def test_units_are_log_uniform_from_a_thousandth_to_a_thousand() -> None:
    family = RandomScaling(TASKS["quadratic"](dim=2000))
    logs = family.sample(make_generator(0))["coordinate_scale"].log10()
    assert logs.abs().max() <= 3.0001
    torch.testing.assert_close(logs.histc(4, -3, 3), torch.full((4,), 500.0), rtol=0.15, atol=0)


def test_noise_changes_gradients_by_what_was_drawn_and_no_loss() -> None:
    inner = TASKS["mlp"](**SMALL)
    noisy = GradientNoise(inner, std=0.5)
    _, params, batch = draw_tasks(noisy, 2)
    plain = {key: x for key, x in batch.items() if key != noisy.key}
    noisy_grads, noisy_losses = vmap(grad_and_value(noisy.loss))(params, batch)
    grads, losses = vmap(grad_and_value(inner.loss))(params, plain)
    assert torch.equal(noisy_losses, losses)
    difference = inner.spec.flatten(noisy_grads) - inner.spec.flatten(grads)
    torch.testing.assert_close(difference, batch[noisy.key], rtol=0, atol=1e-6)
    assert difference.std() == pytest.approx(0.5, rel=0.1)
    assert abs(float(difference.mean())) < 0.1
    assert not torch.equal(difference[0], difference[1])


def test_noise_is_new_in_every_batch_and_absent_from_other_splits() -> None:
    family = GradientNoise(TASKS["mlp"](**SMALL))
    seeds = derive_seeds(0, "batch", torch.arange(2))
    draws = [family.batch({}, s)[family.key] for s in (seeds, seeds, seeds + 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert family.key not in family.batch({}, seeds, "inner_valid")
    whole = family.full_batch({}, 2, "train")
    assert whole is not None
    assert family.key not in whole


def test_reduced_batches_are_the_first_examples_in_turn() -> None:
    inner = TASKS["mlp"](**SMALL)
    family = ReducedBatch(inner)
    seeds = derive_seeds(0, "batch", torch.arange(3))
    tasks = {family.key: torch.tensor([1.0, 0.25, 0.01])}
    batch, plain = family.batch(tasks, seeds), inner.batch({}, seeds)
    assert torch.equal(batch["x"][0], plain["x"][0])
    assert torch.equal(batch["x"][1], plain["x"][1, :4].repeat(4, 1))
    assert torch.equal(batch["y"][1], plain["y"][1, :4].repeat(4))
    assert torch.equal(batch["x"][2], plain["x"][2, :1].expand(16, -1))
    held_out = family.batch(tasks, seeds, "test")
    assert torch.equal(held_out["x"], inner.batch({}, seeds, "test")["x"])


def test_shares_are_log_uniform_from_the_smallest_to_one() -> None:
    family = ReducedBatch(TASKS["mlp"](**SMALL), smallest=0.01)
    shares = torch.stack([family.sample(make_generator(i))[family.key] for i in range(400)])
    assert shares.min() >= 0.01
    assert shares.max() <= 1
    assert (shares < 0.1).float().mean() == pytest.approx(0.5, abs=0.08)


def test_loss_scaling_scales_losses_and_gradients_of_a_task_and_no_metric() -> None:
    inner = TASKS["mlp"](**SMALL)
    family = LossScaling(inner, log(100))
    tasks, params, batch = draw_tasks(family, 4)
    factors = tasks[family.key]
    assert factors.unique().numel() == 4
    plain = {key: x for key, x in batch.items() if key != family.key}
    grads, losses = vmap(grad_and_value(family.loss))(params, batch)
    expected_grads, expected = vmap(grad_and_value(inner.loss))(params, plain)
    torch.testing.assert_close(losses, factors * expected)
    torch.testing.assert_close(inner.spec.flatten(grads), factors[:, None] * inner.spec.flatten(expected_grads))
    assert torch.equal(vmap(family.metrics)(params, batch)["accuracy"], vmap(inner.metrics)(params, plain)["accuracy"])


def run_sgd(family: TaskFamily, steps: int, **options: Any) -> tuple[list[Tensor], list[Tensor], Slots]:
    """The parameters before each step, the gradients there, and where the slots of SGD of rate 1 are at the end."""
    loop = InnerLoop(RULES["sgd"](lr=1.0), family, 5, lambda seeds: torch.full_like(seeds, 6), **options)
    slots, params, grads = loop.start(torch.arange(3)), [], []
    for _ in range(steps):
        params.append(slots.params.detach())
        grads.append(slots.grad.detach())
        slots = loop.unroll(slots, 1).slots
    return params, grads, slots


@pytest.mark.parametrize("order", [1, 2])
def test_a_step_is_by_the_gradient_of_as_many_steps_ago(order: int) -> None:
    params, grads, _ = run_sgd(StaleGradients(TASKS["quadratic"](dim=3), low=2, high=2), 6, order=order)
    for step in range(5):
        torch.testing.assert_close(params[step + 1], params[step] - grads[max(step - 2, 0)])
        assert not torch.equal(grads[step], grads[step + 1])


def test_every_task_has_a_delay_of_its_own_and_a_new_one_forgets() -> None:
    family = StaleGradients(TASKS["quadratic"](dim=3), low=0, high=3)
    delays = torch.stack([family.sample(make_generator(i))[family.delay] for i in range(400)])
    assert delays.bincount().tolist() == pytest.approx([100] * 4, rel=0.3)
    params, grads, slots = run_sgd(family, 9)  # tasks end after 6 steps
    for slot, (first, second) in enumerate(zip(*(run_delays(family, episode) for episode in (0, 1)), strict=True)):
        for step in (0, 1, 2, 3, 4, 6, 7):
            begin, delay = (0, first) if step < 6 else (6, second)
            seen = grads[max(step - delay, begin)][slot]
            torch.testing.assert_close(params[step + 1][slot], params[step][slot] - seen)
    assert slots.episode.tolist() == [1, 1, 1]


def run_delays(family: StaleGradients, episode: int) -> list[int]:
    """The delays of three slots' tasks."""
    ids = torch.arange(3)
    slots = InnerLoop(RULES["sgd"](lr=1.0), family, 5).restart(ids, torch.full_like(ids, episode))
    return [int(delay) for delay in slots.task[family.delay]]


def test_without_delay_nothing_changes_and_losses_never_do() -> None:
    inner = TASKS["quadratic"](dim=3)
    plain = run_sgd(inner, 4)
    for found, expected in zip(run_sgd(StaleGradients(inner, low=0, high=0), 4)[:2], plain[:2], strict=True):
        assert all(map(torch.equal, found, expected))
    _, params, batch = draw_tasks(StaleGradients(inner), 2)
    assert torch.equal(StaleGradients(inner).losses(params, batch), inner.losses(params, batch))


@pytest.mark.parametrize("name", ["truncated", "pes", "es"])
def test_late_gradients_are_all_in_the_carry(name: str) -> None:
    """Two windows are those of a carry that was taken apart in between; and the delay matters to the estimate."""
    family = StaleGradients(TASKS["quadratic"](dim=3), low=1, high=2)
    estimator = ESTIMATORS[name](num_steps=2)
    loop = InnerLoop(RULES["sgd"](lr=0.1), family, 5, lambda seeds: torch.full_like(seeds, 5))
    plain = InnerLoop(RULES["sgd"](lr=0.1), family.family, 5, loop.horizon)
    estimates = []
    for own in (loop, loop, plain):
        carry = estimator.estimate(own, estimator.start(own, torch.arange(3))).carry
        if own is loop and estimates:
            leaves, spec = tree_flatten(carry)
            carry = tree_unflatten([leaf.clone() for leaf in leaves], spec)
        estimates.append(estimator.estimate(own, carry).gradient["lr"])
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])


def chain(names: list[str]) -> Transform:
    family = TASKS["mlp"](**SMALL)
    for name in names:
        family = TRANSFORMS[name](family)
    assert isinstance(family, Transform)
    return family


@pytest.mark.parametrize("names", [*([name] for name in TRANSFORMS), list(TRANSFORMS), list(TRANSFORMS)[::-1]])
def test_transforms_run_alone_and_one_on_another(names: list[str]) -> None:
    family = chain(names)
    tasks, params, batch = draw_tasks(family, 3)
    torch.testing.assert_close(family.losses(params, batch), vmap(family.loss)(params, batch), rtol=1e-5, atol=0)
    for split in ("train", "test"):
        whole = family.full_batch(tasks, 3, split)
        assert whole is not None
        assert vmap(family.loss)(params, whole).isfinite().all()
    window = InnerLoop(RULES["adam"](), family, seed=0).unroll(
        InnerLoop(RULES["adam"](), family, seed=0).start(torch.arange(3)), 3
    )
    assert window.losses.isfinite().all()
    moved = family.to("meta")
    there = {key: x.to("meta") for key, x in stack_trees([moved.sample(make_generator(0))]).items()}
    found = moved.batch(there, torch.arange(1, device="meta"))
    assert {x.device.type for x in found.values()} == {"meta"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda family: RandomScaling(family, -1), "scale_range"),
        (lambda family: RandomScaling(family, level="row"), "global.*row"),
        (lambda family: GradientNoise(family, std=-1.0), "std"),
        (lambda family: ReducedBatch(family, smallest=0.0), "smallest"),
        (lambda family: ReducedBatch(TASKS["lasso"]()), "lasso.*no batches of examples"),
        (lambda family: LossScaling(family, -1.0), "scale_range"),
        (lambda family: StaleGradients(family, 3, 2), "low=3 and high=2"),
        (lambda family: StaleGradients(family, -1, 2), "low=-1"),
        (lambda family: RandomScaling(LossScaling(RandomScaling(family))), "applied twice"),
    ],
)
def test_bad_arguments_are_named(make: Callable[..., Transform], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(TASKS["mlp"](**SMALL))
