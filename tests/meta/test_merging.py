"""How gradients and metrics of several ranks and sources become one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.trainer.merging import Merger, Total, merge_ranks, merge_sources, project_conflicts
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.trainer.source import Source
from lopt.meta.trainer.trainer import Trainer
from lopt.rules import RULES
from lopt.tasks import TASKS


class Given(type(ESTIMATORS["truncated"]())):  # type: ignore[misc]
    """An estimator of a constant gradient."""

    def __init__(self, value: float, num_tasks: int = 2) -> None:
        super().__init__(num_steps=1)
        self.value, self.num_tasks = value, num_tasks

    def estimate(self, loop: Any, carry: Any) -> Estimate:
        gradient = {name: torch.full_like(w, self.value) for name, w in loop.rule.meta_weights().items()}
        numbers = dict.fromkeys(("loss", "meta_loss"), self.value)
        counts = dict.fromkeys(("skipped_slots", "finished_tasks", "inner_steps"), 1.0)
        return Estimate(gradient, self.num_tasks, carry, numbers | counts)


def step_given(*sources: tuple[float, int, float], merge: str = "mean") -> tuple[dict[str, float], Tensor]:
    """Metrics and clipped direction of one step of sources of (gradient, finite tasks, weight)."""
    family = TASKS["quadratic"](dim=2)
    made = [
        Source(family, Given(value, count), 2, weight=w, name=str(i)) for i, (value, count, w) in enumerate(sources)
    ]
    trainer = Trainer(RULES["linear"](), made, None, TrainerConfig(clip=1e9, merge=merge))
    seen = []
    trainer.outer.adamw.step = lambda: seen.append(torch.cat([w.grad.flatten() for w in trainer.rule.parameters()]))  # type: ignore
    return trainer.train_step(), seen[0] if seen else torch.zeros(1)


def test_an_outer_step_takes_the_weighted_mean_of_the_sources() -> None:
    metrics, gradient = step_given((1.0, 2, 1.0), (5.0, 1, 3.0))
    assert torch.allclose(gradient, torch.full_like(gradient, 4.0), rtol=1e-6)
    assert metrics["loss"] == pytest.approx(4.0)
    assert metrics["inner_steps"] == 2


def test_a_source_without_a_finite_task_does_not_count() -> None:
    metrics, gradient = step_given((1.0, 2, 1.0), (0.0, 0, 3.0))
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert metrics["loss"] == 1.0
    metrics, gradient = step_given((1.0, 0, 1.0), (0.0, 0, 3.0))
    assert not gradient.any()
    assert math.isnan(metrics["loss"])


def test_normalised_sources_count_alike_whatever_their_size() -> None:
    _, gradient = step_given((1e-3, 2, 1.0), (-1e6, 2, 3.0), merge="normalised")
    assert torch.allclose(gradient * len(gradient) ** 0.5, torch.full_like(gradient, (1 - 3) / 4), rtol=1e-6)


def test_the_size_that_a_gradient_is_divided_by_is_a_running_one() -> None:
    merger = Merger("normalised", [1.0])
    sizes = []
    for value, alive in ((2.0, 1), (float("nan"), 1), (5.0, 0), (4.0, 1)):
        total = Total(torch.tensor([value]), alive, {})
        sizes.append(float(merger([total]).gradient))
    assert sizes[0] == pytest.approx(1.0)
    mean_square = (0.9 * 0.1 * 2.0**2 + 0.1 * 4.0**2) / (1 - 0.9**2)
    assert sizes[3] == pytest.approx(4.0 / mean_square**0.5)
    assert merger.counts.tolist() == [2]


def merge_pcgrad(*gradients: list[float], weights: list[float] | None = None) -> list[float]:
    totals = [Total(torch.tensor(g, dtype=torch.float64), 1, {}) for g in gradients]
    return Merger("pcgrad", weights or [1.0] * len(totals))(totals).gradient.tolist()


def test_parts_of_gradients_against_one_another_are_taken_out() -> None:
    assert merge_pcgrad([1, 1], [1, 0]) == [1, 0.5]  # in agreement: the mean
    # (1, 0) and (-1, 1): each without the other's direction is (0.5, 0.5) and (0, 1).
    assert merge_pcgrad([1, 0], [-1, 1]) == [0.25, 0.75]
    assert merge_pcgrad([1, 0], [-1, 1], weights=[3, 1]) == [0.375, 0.625]
    assert merge_pcgrad([1, 0], [-2, 0]) == [0, 0]
    # The third agrees with both; the first is against the second only.
    assert merge_pcgrad([1, 0, 0], [-1, 1, 0], [0, 0, 3]) == pytest.approx([0.5 / 3, 1.5 / 3, 1])
    assert merge_pcgrad([1, 2], [0, 0]) == [0.5, 1]


def test_two_sources_in_conflict_never_lose_by_their_merged_step() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        merged = torch.tensor(merge_pcgrad((100 * a).tolist(), b.tolist()), dtype=torch.float64)
        assert merged @ a >= -1e-9
        assert merged @ b >= -1e-9


def test_what_is_taken_out_of_a_gradient_leaves_its_noise() -> None:
    totals = [Total(torch.tensor(g), 1, {"gradient_noise": n}) for g, n in (([3.0, 0.0], 0.5), ([-4.0, 4.0], 0.25))]
    first, second = project_conflicts(totals)
    norms = [float(total.gradient.norm()) for total in (*totals, first, second)]
    assert first.metrics["gradient_noise"] * norms[2] == pytest.approx(0.5 * norms[0])
    assert second.metrics["gradient_noise"] * norms[3] == pytest.approx(0.25 * norms[1])


def test_a_source_without_a_finite_task_takes_nothing_out() -> None:
    _, gradient = step_given((1.0, 2, 1.0), (-1.0, 0, 1.0), merge="pcgrad")
    assert bool((gradient > 0).all())


class Told(Ranks):
    """Rank 0 of several whose messages are given."""

    def __init__(self, others: list[Estimate]) -> None:
        super().__init__(0, 1 + len(others))
        self.others = others

    def add(self, values: Tensor) -> Tensor:
        return values + sum(e.gradient["w"].double() * e.num_tasks for e in self.others)

    def exchange(self, message: Any) -> list[Any]:
        told = [message]
        for e in self.others:
            found: list[Any] = []
            single = Ranks()
            single.exchange = lambda m, found=found: [found.append(m) or m]  # type: ignore
            merge_ranks([e], e.gradient, single)
            told.append(found[0])
        return told


def make_estimate(gradients: Tensor, loss: Tensor) -> Estimate:
    """What an evolution strategy says of tasks with these gradients `[T, W]` and losses `[T]`."""
    count, mean = len(gradients), gradients.mean(0)
    variance = (gradients.square().mean(0) - mean.square()) / count
    metrics = {"loss": float(loss.mean()), "skipped_slots": 1.0}
    metrics["gradient_noise"] = float(variance.sum().sqrt() / mean.norm())
    return Estimate({"w": mean}, count, None, metrics)


def test_estimates_of_unequal_ranks_merge_to_that_of_all_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(7, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 3])
    losses = torch.rand(7, generator=generator, dtype=torch.float64)
    parts = [make_estimate(gradients[rows], losses[rows]) for rows in (slice(0, 4), slice(4, 5), slice(5, 7))]
    whole = make_estimate(gradients, losses)
    (merged,) = merge_ranks([parts[0]], parts[0].gradient, Told(parts[1:]))
    assert merged.num_tasks == 7
    assert torch.allclose(merged.gradient, whole.gradient["w"], rtol=1e-12)
    assert merged.metrics["skipped_slots"] == 3
    for name in ("loss", "gradient_noise"):
        assert merged.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-10)


def test_the_noise_of_independent_sources_adds_up() -> None:
    totals = [Total(torch.tensor([3.0, 4.0]), 2, {"gradient_noise": 0.2}), Total(torch.zeros(2), 3, {})]
    assert "gradient_noise" not in merge_sources(totals, [1, 1]).metrics
    totals[1] = Total(torch.tensor([3.0, 4.0]), 3, {"gradient_noise": 0.2})
    assert merge_sources(totals, [1, 1]).metrics["gradient_noise"] == pytest.approx(0.2 / math.sqrt(2))
