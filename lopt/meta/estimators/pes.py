"""Persistent evolution strategies: short windows without their bias.

What earlier windows have done to the state is accounted for by adding up their perturbations.

Source: Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835.
"""

from __future__ import annotations

from torch import Tensor

from lopt.meta.estimators.evolution import Evolution, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots


class PES(Evolution):
    """A new perturbation in every window; losses count for the sum of all perturbations since the task began.

    Unbiased for any length of the window (up to the smoothing by sigma), at a variance that grows with the number of
    windows of a run. After a reset within a window losses count for that window's perturbation only.
    """

    name = "pes"
    persistent = True

    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        return draw_perturbation(loop, start.ids, start.episode, start.step)
