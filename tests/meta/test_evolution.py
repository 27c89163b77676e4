"""Evolution strategies: against their formula, against expectations known in closed form, against backpropagation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from estimator_cases import Balance, Drift, FirstState, Trap, constant, flatten
from torch import Tensor

from lopt.core.random import derive_seeds, draw_normal
from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.estimators.evolution import Evolution, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import select_slots
from lopt.meta.unroll.whole_runs import run_to_end
from lopt.rules import RULES
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.base import Batch, Task

EVOLUTION = [name for name, estimator in ESTIMATORS.items() if issubclass(estimator, Evolution)]
QUADRATIC = TASKS["quadratic"](dim=4)


def build(name: str, num_steps: int, **options: Any) -> Evolution:
    estimator = ESTIMATORS[name](num_steps=num_steps, **options)
    assert isinstance(estimator, Evolution)
    return estimator


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVOLUTION)
@pytest.mark.parametrize("objective", ["mean", "sum", "log", "final"])
def test_the_first_estimate_is_the_mean_over_pairs_of_their_difference(name: str, objective: str) -> None:
    rule, tasks, steps, sigma = RULES["momentum"](lr=0.01), 3, 4, 0.01
    loop = InnerLoop(rule, QUADRATIC, 7, constant(steps))
    estimator = build(name, steps, sigma=sigma, objective=objective)
    carry = estimator.start(loop, torch.arange(tasks))
    carry = carry._replace(slots=carry.slots._replace(horizon=torch.full_like(carry.slots.horizon, steps)))
    found = estimator.estimate(loop, carry)
    start = loop.start(torch.arange(tasks))
    expected = torch.zeros(len(flatten(found.gradient)), dtype=torch.float64)
    for i in range(tasks):
        noise = estimator.perturb(loop, select_slots(start, slice(i, i + 1)), start.episode[i : i + 1])[0]
        values = []
        for sign in (1, -1):
            other = RULES["momentum"](lr=0.01)
            with torch.no_grad():
                for w, n in zip(other.meta_weights().values(), noise, strict=True):
                    w += sign * sigma * n
            losses = InnerLoop(other, QUADRATIC, 7, constant(steps)).unroll(start, steps, restart=False).losses[:, i]
            value = {"mean": losses.mean(), "sum": losses.sum(), "log": losses.log().mean(), "final": losses[-1]}
            values.append(value[objective].detach().double())
        expected += (values[0] - values[1]) * noise / (2 * sigma) / tasks
    torch.testing.assert_close(flatten(found.gradient).double(), expected, rtol=1e-3, atol=1e-6)
    assert found.num_tasks == tasks
    assert found.metrics["skipped_slots"] == 0


# -- guidance by a teacher ---------------------------------------------------------------------------------------------


def run_member(loop: InnerLoop, task: int, steps: int, offset: float, moved: Tensor) -> Tensor:
    """Losses `[steps]` of one task under momentum with meta-weights of its own."""
    rule = RULES["momentum"](lr=0.01)
    with torch.no_grad():
        weights = rule.meta_weights()
        weights["lr"] += offset
        for w, x in zip(weights.values(), moved, strict=True):
            w += x
        return replace(loop, rule=rule).unroll(loop.start(torch.tensor([task])), steps, restart=False).losses[:, 0]


@pytest.mark.parametrize(
    ("jitter", "objective"), [({"lr": 0.004}, "mean"), ({}, "log_tail"), ({"lr": 0.004}, "log_tail")]
)
def test_jitter_is_of_both_members_and_the_tail_is_of_whole_runs(jitter: dict[str, float], objective: str) -> None:
    tasks, steps, sigma = 3, 20, 1e-3
    loop = InnerLoop(RULES["momentum"](lr=0.01), QUADRATIC, 7, constant(steps))
    estimator = build("full_es", steps, sigma=sigma, objective=objective, jitter=jitter)
    found = estimator.estimate(loop, estimator.start(loop, torch.arange(tasks)))
    start, offsets = loop.start(torch.arange(tasks)), []
    expected = torch.zeros(len(flatten(found.gradient)), dtype=torch.float64)
    for i in range(tasks):
        noise = estimator.perturb(loop, select_slots(start, slice(i, i + 1)), start.episode[i : i + 1])[0]
        seeds = derive_seeds(7, "jitter", torch.tensor([i]), torch.tensor([0]), 0)
        offsets.append(float(jitter.get("lr", 0.0) * draw_normal(seeds, 1)))
        first = start.first_loss[i]
        values = []
        for sign in (1, -1):
            losses = run_member(loop, i, steps, offsets[-1], sign * sigma * noise)
            tail = (losses[-2:] / first + 1e-5).log().mean()
            values.append((losses.mean() if objective == "mean" else tail).double())
        expected += (values[0] - values[1]) * noise / (2 * sigma) / tasks
    torch.testing.assert_close(flatten(found.gradient).double(), expected, rtol=1e-2, atol=1e-5)
    assert len(set(offsets)) == (tasks if jitter else 1)


def test_jitter_of_a_meta_weight_that_there_is_not_is_refused() -> None:
    loop = InnerLoop(RULES["momentum"](lr=0.01), QUADRATIC, 7)
    with pytest.raises(ValueError, match=r"meta-weight .*'lrr'"):
        build("es", 4, jitter={"lrr": 1.0}).start(loop, torch.arange(2))


@pytest.mark.parametrize("name", EVOLUTION)
def test_pairs_that_follow_a_teacher_learn_from_its_steps_alone(name: str) -> None:
    """The distance is quadratic in the rate: the antithetic difference is exactly its derivative along each draw."""
    rule, tasks, steps = RULES["sgd"](lr=0.01), 3, 4
    loop = InnerLoop(rule, QUADRATIC, 7, constant(steps))
    options: dict[str, Any] = {"teacher": RULES["sgd"](lr=0.02), "imitation": 10.0, "follow": 1.0}
    estimator = build(name, steps, sigma=1e-3, **options)
    carry = estimator.start(loop, torch.arange(tasks))
    carry = carry._replace(slots=carry.slots._replace(horizon=torch.full_like(carry.slots.horizon, steps)))
    found = estimator.estimate(loop, carry)
    exact, expected = ESTIMATORS["full"](num_steps=steps, **options), torch.zeros(2, dtype=torch.float64)
    start = loop.start(torch.arange(tasks))
    for i in range(tasks):
        gradient = flatten(exact.estimate(loop, exact.start(loop, torch.tensor([i]))).gradient).double()
        noise = estimator.perturb(loop, select_slots(start, slice(i, i + 1)), start.episode[i : i + 1])[0]
        expected += (gradient @ noise) * noise / tasks
    torch.testing.assert_close(flatten(found.gradient).double(), expected, rtol=1e-2, atol=1e-5)
    assert expected.abs().min() > 1e-3
    assert found.metrics["imitation_loss"] > 0


@pytest.mark.parametrize("name", ["truncated", *EVOLUTION])
def test_guidance_that_has_fallen_to_nothing_changes_nothing(name: str) -> None:
    loop = InnerLoop(RULES["momentum"](lr=0.01), QUADRATIC, 7, constant(6))
    options = {"teacher": RULES["adam"](lr=0.1), "imitation": 10.0, "follow": 0.5}
    plain, guided = ESTIMATORS[name](num_steps=3), ESTIMATORS[name](num_steps=3, **options)  # type: ignore[arg-type]
    gradients = []
    for estimator, guidance in ((plain, 1.0), (guided, 0.0), (guided, 1.0)):
        own = replace(loop, guidance=guidance)
        gradients.append(flatten(estimator.estimate(own, estimator.start(own, torch.arange(4))).gradient))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_the_imitation_loss_of_a_diverging_pair_is_clamped() -> None:
    loop = InnerLoop(RULES["sgd"](lr=1e8), QUADRATIC, 7, constant(3))
    estimator = build("es", 1, sigma=1e6, teacher=RULES["sgd"](lr=0.0), imitation=1.0, follow=1.0, loss_clamp=2.0)
    found = estimator.estimate(loop, estimator.start(loop, torch.arange(4)))
    assert found.num_tasks == 4
    assert flatten(found.gradient).abs().max() == 0  # both members are beyond the clamp


# -- expectations: a problem whose meta-loss is linear -----------------------------------------------------------------


class Linear(TaskFamily):
    """The loss is a sum of the parameters' multiples; it never comes near the clamp."""

    name = "linear"
    slope = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(3, dtype=torch.float64)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return {"slope": self.slope.expand(len(seeds), 3)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 1000 + (batch["slope"] * params["x"]).sum()


@pytest.mark.parametrize("samples", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["es", "pes", "nres", "es_single", "full_es"])
def test_estimates_on_a_linear_loss_are_unbiased_over_windows_that_cross_resets(name: str, samples: int) -> None:
    rule, family, horizon, steps = Drift(3), Linear(), 7, 4
    loop = InnerLoop(rule, family, 1, constant(horizon))
    estimator = build(name, horizon if name == "full_es" else steps)
    carry = estimator.start(loop, torch.arange(samples))
    for window in range(3):  # drifts add up, and slots have been reset
        found = estimator.estimate(loop, carry)
        first, kept = carry.slots, estimator.kept
        steps_made = first.step[::kept, None] + torch.arange(1, estimator.num_steps + 1)
        # The t-th loss since a reset is slope . t theta; the second horizon of a staggered slot is whole.
        ends = first.horizon[::kept, None]
        age = torch.where(steps_made > ends, steps_made - ends, steps_made)
        if name == "es":  # the influence of this window only: the steps since it began, or since the reset
            age = torch.minimum(age, torch.arange(1, steps + 1))
        expected = family.slope * age.double().mean()
        error = flatten(found.gradient) - expected
        deviation = found.metrics["gradient_noise"] * flatten(found.gradient).norm()  # of the whole vector
        assert error.norm() < 3 * deviation, window
        assert deviation < 0.1 * expected.norm()  # the test can tell
        carry = found.carry


# -- influence balancing -----------------------------------------------------------------------------------------------


def run_episode(name: str, tasks: int, horizon: int, steps: int) -> float:
    """The estimate of d(mean loss)/d theta over whole runs in windows of `steps` steps."""
    loop = InnerLoop(Balance(), FirstState(), 3, constant(horizon))
    estimator = ESTIMATORS[name](num_steps=steps, loss_clamp=1e6)
    carry = estimator.start(loop, torch.arange(tasks))
    slots = getattr(carry, "slots", carry)
    whole = slots._replace(horizon=torch.full_like(slots.horizon, horizon))
    carry = carry._replace(slots=whole) if slots is not carry else whole
    total = 0.0
    for _ in range(horizon // steps):
        estimate = estimator.estimate(loop, carry)
        total += float(estimate.gradient["theta"]) * steps / horizon
        carry = estimate.carry
    return total


def test_influence_balancing_fools_short_windows_but_not_persistent_perturbations() -> None:
    horizon = 200
    exact = run_episode("full", 1, horizon, horizon)
    short = {name: run_episode(name, 1 if name == "truncated" else 500, horizon, 2) for name in ("truncated", "es")}
    assert all(value * exact < 0 for value in short.values()), short  # the wrong way
    for name in ("pes", "nres"):
        assert abs(run_episode(name, 500, horizon, 2) - exact) < 0.2 * abs(exact), name


def test_noise_reuse_has_the_lower_variance_on_a_smooth_problem() -> None:
    loop = InnerLoop(RULES["momentum"](lr=0.01), QUADRATIC, 0, constant(40))
    noises = {}
    for name in ("pes", "nres"):
        estimator, noise = build(name, 4, objective="log"), []
        carry = estimator.start(loop, torch.arange(256))
        for _ in range(20):
            estimate = estimator.estimate(loop, carry)
            carry = estimate.carry
            noise.append(estimate.metrics["gradient_noise"] * float(flatten(estimate.gradient).norm()))
        noises[name] = sum(noise[10:])
    assert noises["nres"] < noises["pes"]


# -- slots are independent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVOLUTION)
def test_a_pair_that_is_dropped_starts_anew_without_drift(name: str) -> None:
    family, bad = Trap("loss", (0, 2)), [0, 2]
    family.spec  # draws one task for the shapes  # noqa: B018
    family.drawn = 0
    estimator = build(name, 5)
    loop = InnerLoop(RULES["lstm"](hidden=3), family, 0, constant(5))
    carry = estimator.start(loop, torch.arange(4))
    estimate = estimator.estimate(loop, carry)
    assert estimate.carry.slots.ids.tolist() == carry.slots.ids.tolist()
    assert (estimate.carry.slots.episode[:: estimator.kept][bad] == 1).all()
    assert (estimate.carry.drift[bad] == 0).all()


@pytest.mark.parametrize("name", EVOLUTION)
def test_chunks_of_the_slots_do_not_change_the_estimate_nor_the_carry(name: str) -> None:
    loop = InnerLoop(RULES["momentum"](lr=0.01), QUADRATIC, 0, constant(9))
    ids = torch.arange(6)
    results = []
    for shares, chunk in (((6,), None), ((6,), 1), ((6,), 4), ((2, 4), None), ((1, 2, 3), 2)):
        estimator = build(name, 4, task_chunk=chunk)
        carries = [estimator.start(loop, part) for part in ids.split(list(shares))]
        for _ in range(3):
            estimates = [estimator.estimate(loop, carry) for carry in carries]
            carries = [estimate.carry for estimate in estimates]
        results.append(sum(flatten(e.gradient).double() * e.num_tasks for e in estimates) / 6)
        params = torch.cat([c.slots.params for c in carries])
        results[-1] = torch.cat([results[-1], params.flatten()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_the_clamp_bounds_what_a_diverging_pair_does() -> None:
    loop = InnerLoop(RULES["sgd"](lr=0.3), QUADRATIC, 0, constant(30))
    for clamp in (2.0, 20.0):
        estimate = build("full_es", 10, loss_clamp=clamp, normalize=True, sigma=0.1).estimate
        found = estimate(loop, build("full_es", 10).start(loop, torch.arange(8)))
        noise = draw_perturbation(loop, torch.arange(8), torch.zeros(8, dtype=torch.int64)).abs().mean()
        assert found.gradient["lr"].abs() <= clamp * noise / (2 * 0.1)
        assert found.gradient["lr"].isfinite()


def test_whole_runs_end_at_their_own_horizons() -> None:
    rule = RULES["momentum"](lr=0.01)
    loop = InnerLoop(rule, QUADRATIC, 0, lambda seeds: 3 + 4 * (seeds % 3))
    slots = loop.start(torch.arange(6))
    window = run_to_end(loop, slots)
    assert window.active.sum(0).tolist() == slots.horizon.tolist()
    assert window.finished.sum(0).tolist() == [1] * 6
    for i in range(6):
        alone = loop.unroll(select_slots(slots, slice(i, i + 1)), int(slots.horizon[i]), restart=False)
        assert window.active[:, i].nonzero()[:, 0].tolist() == list(range(int(slots.horizon[i])))
        torch.testing.assert_close(window.losses[: len(alone.losses), i], alone.losses[:, 0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(window.slots.params[i], alone.slots.params[0], rtol=1e-5, atol=1e-7)


def test_the_lowest_loss_of_a_run_is_an_objective_of_whole_runs_only() -> None:
    loop = InnerLoop(RULES["sgd"](lr=0.001), QUADRATIC, 0, constant(5))
    by_min, by_final = (
        build("full_es", 5, objective=o, sigma=1e-4).estimate(loop, build("full_es", 5).start(loop, torch.arange(4)))
        for o in ("min", "final")
    )
    torch.testing.assert_close(by_min.gradient["lr"], by_final.gradient["lr"])  # the loss falls in every step
    with pytest.raises(ValueError, match="objective must be one of"):
        build("pes", 5, objective="min")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma": 0.0}, "sigma must be positive"), ({"num_steps": 0}, "num_steps must be at least 1"),
     ({"loss_clamp": 1.0}, "loss_clamp must be above 1"), ({"task_chunk": 0}, "task_chunk must be at least 1"),
     ({"jitter": {"lr": 0.0}}, "jitter of 'lr' must be above 0")],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ESTIMATORS["pes"](**options)
