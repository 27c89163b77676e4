"""How the meta-gradients of several sources become one.

A weighted mean lets the source with the largest gradient have its way: a log loss that falls to 1e-9 outweighs all
others by a factor of a hundred. "normalised" divides each source's gradient by a running root mean square of its norm.
"pcgrad" takes out of each gradient what is against another one (Yu et al. 2020, arXiv 2001.06782).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lopt.meta.trainer.source import NOISE, Total, merge_sources

STATE = "merge."
DECAY = 0.9  # of the mean squares of gradient norms


class Merger:
    """Merges the sources' gradients, and remembers how large they were.

    Args:
        merge: "mean", "normalised" or "pcgrad", see `lopt.meta.config.run.TrainerConfig`.
        weights: of the sources.
    """

    def __init__(self, merge: str, weights: Sequence[float]) -> None:
        self.merge, self.weights = merge, list(weights)
        self.squares = torch.zeros(len(self.weights), dtype=torch.float64)
        """Averages of the squared norms, not corrected for their start at 0."""
        self.counts = torch.zeros(len(self.weights), dtype=torch.int64)
        """Estimates that went into each."""

    def __call__(self, totals: Sequence[Total]) -> Total:
        """One gradient of all; equal on all ranks, as `totals` are."""
        if self.merge == "normalised":
            totals = [self._normalise(i, total) for i, total in enumerate(totals)]
        elif self.merge == "pcgrad":
            totals = project_conflicts(totals)
        return merge_sources(totals, self.weights)

    def _normalise(self, index: int, total: Total) -> Total:
        square = total.gradient.double().square().sum()
        if not total.num_tasks or not bool(square.isfinite()) or not float(square):
            return total
        self.counts[index] += 1
        self.squares[index] = DECAY * self.squares[index] + (1 - DECAY) * square.cpu()
        size = (self.squares[index] / (1 - DECAY ** self.counts[index].double())).sqrt()
        return total._replace(gradient=total.gradient / size.to(total.gradient.device))

    # -- saving ----------------------------------------------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: something for "normalised" only."""
        if self.merge != "normalised":
            return {}
        return {f"{STATE}squares": self.squares, f"{STATE}counts": self.counts}

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `gather_state` returned, among other tensors."""
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
        own = total.gradient
        for other in (*gradients[i + 1 :], *gradients[:i]):
            overlap = own @ other
            if bool(overlap < 0):
                own = own - overlap / other.square().sum() * other
        metrics = dict(total.metrics)
        if NOISE in metrics and own is not total.gradient:
            metrics[NOISE] *= float(total.gradient.norm() / own.norm())
        projected.append(total._replace(gradient=own, metrics=metrics))
    return projected
