"""What an outer step learns from: sources of meta-gradients, and how those of ranks and sources make one.

A source is a family of tasks with an estimator and its slots, which have global numbers: distinct over all sources, and
shared out over ranks. Means over tasks are merged in float64, so that the number of ranks is a matter of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopt.meta.estimators import Estimate, Estimator
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.unroll.horizons import HorizonSchedule
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import Rule
from lopt.tasks import TaskFamily

SUMS = ("skipped_slots", "finished_tasks", "inner_steps")
NOISE = "gradient_noise"


class Source:
    """Tasks in progress on this rank, and the estimator that they feed.

    Args:
        family: tasks to train on.
        estimator: where the meta-gradient comes from.
        tasks: slots, over all ranks.
        name: what logs call it.
        weight: of its meta-gradient, relative to other sources'.
        horizon: schedule of the tasks' lengths; the family's own length by default.
        validation_family: tasks that it is validated on; `family` by default.
        guidance: the factor on a teacher's influence in an outer step; 1 by default.
    """

    def __init__(
        self,
        family: TaskFamily,
        estimator: Estimator,
        tasks: int,
        *,
        name: str = "",
        weight: float = 1.0,
        horizon: HorizonSchedule | None = None,
        validation_family: TaskFamily | None = None,
        guidance: Callable[[int], float] | None = None,
    ) -> None:
        self.family, self.estimator, self.tasks, self.weight = family, estimator, tasks, weight
        self.name, self.horizon = name or family.name, horizon
        self.validation_family, self.guidance = validation_family or family, guidance
        self.carry: Any = None
        """None where none of the slots is this rank's."""

    def start(self, rule: Rule, seed: int, first: int, ranks: Ranks, device: torch.device) -> None:
        """Start those of the slots, numbered from `first` on, that are this rank's, where the rule is."""
        self.ranks, self.ids, self.device = ranks, torch.arange(first, first + self.tasks), device
        self.family, self.validation_family = self.family.to(device), self.validation_family.to(device)
        self.estimator = self.estimator.to(device)
        self.loop = InnerLoop(rule, self.family, seed, self.horizon)
        own = ranks.share(self.ids).to(device)
        self.carry = self.estimator.start(self.loop, own) if len(own) else None

    def estimate(self, step: int = 0) -> Estimate | None:
        """The meta-gradient of outer step `step`, on the next window of this rank's slots, which go on."""
        if self.carry is None:
            return None
        loop = replace(self.loop, guidance=self.guidance(step)) if self.guidance else self.loop
        estimate = self.estimator.estimate(loop, self.carry)
        self.carry = estimate.carry
        return estimate

    # -- saving ----------------------------------------------------------------------------------------------------

    def gather_carry(self) -> dict[str, Tensor]:
        """The carry of all slots in order of their numbers, on rank 0 and its CPU; the others get {}."""
        leaves = [leaf.cpu() for leaf in tree_flatten(self.carry)[0]] if self.carry is not None else []
        parts = self.ranks.gather({str(i): leaf for i, leaf in enumerate(leaves)}, to_all=False)
        shares = [Ranks(rank, self.ranks.size).share(self.ids) for rank in range(self.ranks.size)]
        return join_rows([(own, part) for own, part in zip(shares, parts, strict=False) if len(own)])

    def list_carry(self) -> list[str]:
        """The names of what `gather_carry` returns."""
        return [str(i) for i in range(len(tree_flatten(self._example())[0]))]

    def restore_carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what `gather_carry` returned, of the same slots under any number of ranks."""
        if self.carry is None:
            return
        leaves, spec = tree_flatten(self.carry)
        own = self.ranks.share(self.ids) - self.ids[0]
        restored = [_split_rows(tensors[str(i)], self.tasks)[own].flatten(0, 1) for i in range(len(leaves))]
        self.carry = tree_unflatten([leaf.to(self.device) for leaf in restored], spec)

    def _example(self) -> Any:
        """A carry of the structure of all."""
        return self.carry or self.estimator.start(self.loop, self.ids[:1].to(self.device))


def _split_rows(tensor: Tensor, slots: int) -> Tensor:
    """`[slots * rows, ...]` -> `[slots, rows, ...]`: estimators may keep several rows for each slot."""
    return tensor.reshape(slots, tensor.shape[0] // slots, *tensor.shape[1:])


def join_rows(parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Tensors in the order of numbers, from parts: numbers int64 `[n]` and tensors with as many rows, or a multiple."""
    if not parts:
        return {}
    order = torch.cat([ids for ids, _ in parts]).argsort()
    split = [{name: _split_rows(value, len(ids)) for name, value in tensors.items()} for ids, tensors in parts]
    return {name: torch.cat([own[name] for own in split])[order].flatten(0, 1) for name in split[0]}


def list_families(sources: Sequence[Source]) -> dict[str, TaskFamily]:
    """What is validated on: every family once, by the name of its first source."""
    families: dict[str, TaskFamily] = {}
    for source in sources:
        if all(source.validation_family is not known for known in families.values()):
            families[source.name] = source.validation_family
    return families


class Total(NamedTuple):
    """A meta-gradient `[W]` float64, the mean over `num_tasks` tasks, and what goes with it."""

    gradient: Tensor
    num_tasks: int
    metrics: dict[str, float]


def merge_ranks(estimates: Sequence[Estimate | None], weights: Mapping[str, Tensor], ranks: Ranks) -> list[Total]:
    """What the sources' estimates on all ranks come to.

    Args:
        estimates: of every source on this rank.
        weights: the meta-weights, for their order and number.
    """
    size = sum(w.numel() for w in weights.values())
    sums = torch.zeros(len(estimates), size, dtype=torch.float64)
    told: list[dict[str, Any]] = []
    for row, estimate in zip(sums, estimates, strict=True):
        if estimate is None:
            told.append({"num_tasks": 0, "metrics": {}})
            continue
        flat = torch.cat([estimate.gradient[name].detach().flatten() for name in weights]).double().cpu()
        row += flat * estimate.num_tasks
        metrics = dict(estimate.metrics)
        if NOISE in metrics:  # as the mean square of the tasks' gradients, of which means are means
            norm = float(flat.norm())
            metrics[NOISE] = estimate.num_tasks * (metrics[NOISE] * norm) ** 2 + norm**2
        told.append({"num_tasks": estimate.num_tasks, "metrics": metrics})
    sums, merged = ranks.add(sums), []
    for row, parts in zip(sums, zip(*ranks.exchange(told), strict=True), strict=True):
        count = sum(part["num_tasks"] for part in parts)
        metrics = merge_metrics([(part["num_tasks"], part["metrics"]) for part in parts])
        gradient = row / max(count, 1)
        if NOISE in metrics:
            norm = float(gradient.norm())
            variance = max(metrics[NOISE] - norm**2, 0.0) / max(count, 1)  # of the mean
            metrics[NOISE] = math.sqrt(variance) / norm if norm else math.nan
        merged.append(Total(gradient, count, metrics))
    return merged


def merge_sources(totals: Sequence[Total], weights: Sequence[float]) -> Total:
    """The mean of the sources' meta-gradients; those without a finite task do not count."""
    shares = [weight if total.num_tasks else 0.0 for total, weight in zip(totals, weights, strict=True)]
    whole = sum(shares) or 1.0
    gradient = (
        sum((share * total.gradient for share, total in zip(shares, totals, strict=True)), torch.zeros(())) / whole
    )
    metrics = merge_metrics([(share, total.metrics) for share, total in zip(shares, totals, strict=True)])
    if NOISE in metrics and len(totals) > 1:  # sources are independent: their variances add up
        metrics.pop(NOISE)
        if all(NOISE in total.metrics for total in totals):
            parts = [
                share / whole * total.metrics[NOISE] * float(total.gradient.norm())
                for share, total in zip(shares, totals, strict=True)
                if share
            ]
            metrics[NOISE] = math.hypot(*parts) / float(gradient.norm()) if parts and gradient.any() else math.nan
    return Total(gradient, sum(total.num_tasks for total in totals), metrics)


def merge_metrics(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Sums of what is counted, weighted means of the rest over the parts that have it; NaN where none counts."""
    merged = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        having = [(share, metrics[name]) for share, metrics in parts if name in metrics]
        if name in SUMS:
            merged[name] = sum(value for _, value in having)
            continue
        whole = sum(share for share, _ in having)
        merged[name] = sum(share * value for share, value in having if share) / whole if whole else math.nan
    return merged
