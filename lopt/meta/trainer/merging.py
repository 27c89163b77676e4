"""How the estimates of several ranks and sources become one meta-gradient.

First the ranks: each has estimated on its share of a source's slots; means over tasks are merged in float64, so that
the number of ranks is a matter of rounding. Then the sources. A weighted mean of these lets the source with the largest
gradient have its way: a log loss that falls to 1e-9 outweighs all others by a factor of a hundred. "normalised" divides
each source's gradient by a running root mean square of its norm. "pcgrad" takes out of each gradient what is against
another one (Yu et al. 2020, arXiv 2001.06782).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.meta.estimators import Estimate
from lopt.meta.trainer.ranks import Ranks

SUMS = ("skipped_slots", "finished_tasks", "inner_steps")
NOISE = "gradient_noise"
STATE = "merge."
DECAY = 0.9  # of the mean squares of gradient norms


class Total(NamedTuple):
    """A source's, or the whole step's, meta-gradient over all ranks, and what goes with it.

    Attributes:
        gradient: `[W]` float64, the mean over `num_tasks` tasks, all learned meta-weights in their order.
        num_tasks: tasks that were not dropped; 0 where the gradient means nothing.
        metrics: those of the estimates, merged.
    """

    gradient: Tensor
    num_tasks: int
    metrics: dict[str, float]


class Merger:
    """Merges the sources' gradients into that of the outer step, and remembers how large they were.

    Args:
        merge: "mean", "normalised" or "pcgrad", see `lopt.meta.config.trainer.TrainerConfig`.
        weights: of the sources, relative to each other.
    """

    def __init__(self, merge: str, weights: Sequence[float]) -> None:
        self.merge, self.weights = merge, list(weights)
        self.squares = torch.zeros(len(self.weights), dtype=torch.float64)
        """Averages of the squared norms, not corrected for their start at 0."""
        self.counts = torch.zeros(len(self.weights), dtype=torch.int64)
        """Estimates that went into each."""

    def __call__(self, totals: Sequence[Total]) -> Total:
        """One gradient of all sources; equal on all ranks, as `totals` are.

        Args:
            totals: in the order of the weights. Those without a finite task neither count nor are remembered.
        """
        if self.merge == "normalised":
            totals = [self._normalise(i, total) for i, total in enumerate(totals)]
        elif self.merge == "pcgrad":
            totals = project_conflicts(totals)
        return merge_sources(totals, self.weights)

    def _normalise(self, index: int, total: Total) -> Total:
        # A gradient of nothing, or a broken one, must not move the average that later ones are divided by.
        square = total.gradient.double().square().sum()
        if not total.num_tasks or not bool(square.isfinite()) or not float(square):
            return total
        self.counts[index] += 1
        self.squares[index] = DECAY * self.squares[index] + (1 - DECAY) * square.cpu()
        # As in Adam: an average of few squares is too small by the share of the 0 that it began with.
        size = (self.squares[index] / (1 - DECAY ** self.counts[index].double())).sqrt()
        return total._replace(gradient=total.gradient / size.to(total.gradient.device))

    # -- saving ----------------------------------------------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name: the running sizes for "normalised", nothing for the others.

        Without them a resumed run would start its averages anew and go another way.
        """
        if self.merge != "normalised":
            return {}
        return {f"{STATE}squares": self.squares, f"{STATE}counts": self.counts}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `gather_state` returned, in place.

        Args:
            tensors: all of the checkpoint; names that are not this class's are left alone.
        """
        for name, own in (("squares", self.squares), ("counts", self.counts)):
            if f"{STATE}{name}" in tensors:
                own.copy_(tensors[f"{STATE}{name}"])


def project_conflicts(totals: Sequence[Total]) -> list[Total]:
    """Each gradient without its part against others: `g - (g.h / h.h) h` for every other one h with `g.h < 0`.

    The others come in cyclic order from the next one on, where Yu et al. draw the order: that matters for three or more
    gradients in conflict only. Their noise is taken to stay as it is.
    """
    gradients = [total.gradient for total in totals]
    projected = []
    for i, total in enumerate(totals):
        # Against the others as they are, not as they were projected, as in Yu et al.
        own = total.gradient
        for other in (*gradients[i + 1 :], *gradients[:i]):
            overlap = own @ other
            if bool(overlap < 0):
                own = own - overlap / other.square().sum() * other
        # The same noise on a shorter gradient is more noise.
        metrics = dict(total.metrics)
        if NOISE in metrics and own is not total.gradient:
            metrics[NOISE] *= float(total.gradient.norm() / own.norm())
        projected.append(total._replace(gradient=own, metrics=metrics))
    return projected


def merge_ranks(estimates: Sequence[Estimate | None], weights: Mapping[str, Tensor], ranks: Ranks) -> list[Total]:
    """What the sources' estimates on all ranks come to: as if one process had had all slots.

    Gradients are sent as sums over tasks in one tensor, metrics as JSON; all ranks get the same bits.

    Args:
        estimates: of every source on this rank; None where it has none of the slots.
        weights: the meta-weights, for their order and number.
    """
    size = sum(w.numel() for w in weights.values())
    # Sums and not means are sent: ranks have different numbers of tasks.
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
        # What came of all ranks, source by source.
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
    """The weighted mean of the sources' meta-gradients; those without a finite task do not count.

    Args:
        totals: over all ranks.
        weights: of the sources, relative to each other.
    Returns:
        With metrics that are means by the same weights, counts that are sums, and the noise of independent sources.
    """
    shares = [weight if total.num_tasks else 0.0 for total, weight in zip(totals, weights, strict=True)]
    # Without a finite task anywhere this is a gradient of 0, on which no step is made.
    whole = sum(shares) or 1.0
    gradient = (
        sum(
            (share * total.gradient for share, total in zip(shares, totals, strict=True)),
            torch.zeros((), dtype=torch.float32),
        )
        / whole
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
    """One dict of metrics from several: sums of what is counted, weighted means of the rest; NaN where none counts.

    Args:
        parts: a weight and metrics each; a metric that only some have is averaged over these.
    """
    merged = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        having = [(share, metrics[name]) for share, metrics in parts if name in metrics]
        # Counts add up whatever the weights of the sources.
        if name in SUMS:
            merged[name] = sum(value for _, value in having)
            continue
        # What has no weight may be NaN, as the mean of no task is: it must not get into the sum.
        whole = sum(share for share, _ in having)
        merged[name] = sum(share * value for share, value in having if share) / whole if whole else math.nan
    return merged
