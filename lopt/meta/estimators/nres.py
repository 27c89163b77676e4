"""Noise-reuse evolution strategies: one perturbation for a whole run, which all its windows share.

What goes on from window to window is the tasks alone; the perturbation is drawn again, by the same name.

Source: Li et al. 2023, arXiv 2304.12180.
"""

from __future__ import annotations

from torch import Tensor

from lopt.meta.estimators.evolution import Evolution, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots


class NRES(Evolution):
    """Each task keeps its perturbation to its end; the losses of every window count for it.

    Unbiased like `pes`, and of lower variance where the loss is smooth, because perturbations do not add up.
    """

    name = "nres"

    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        return draw_perturbation(loop, start.ids, episode)
