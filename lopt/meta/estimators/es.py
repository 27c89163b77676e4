"""Evolution strategies on truncated windows: no derivatives, smoothed, and biased by the truncation.

Source: Metz et al. 2019, arXiv 1810.10180; the algorithm as in Vicol et al. 2021, arXiv 2112.13835, algorithm 1.
"""

from __future__ import annotations

from torch import Tensor

from lopt.meta.estimators.evolution import Evolution, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots


class ES(Evolution):
    """A new perturbation in every window; both members start from the state of the unperturbed rule.

    The unperturbed rule runs beside them, so a window costs three runs. What a step does beyond its window is not
    seen: short windows are biased towards greedy rules (see `pes`).
    """

    name = "es"
    truncates = True
    signs = (1, -1, 0)
    kept = 1

    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        return draw_perturbation(loop, start.ids, start.episode, start.step)
