"""Evolution strategies on whole runs: unbiased up to the smoothing, with the objective of one's choice.

Source: Rechenberg 1973, Salimans et al. 2017, arXiv 1703.03864; on learned optimizers Metz et al. 2019, 1810.10180.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lopt.meta.estimators.base import Estimate
from lopt.meta.estimators.evolution import Evolution, Pairs, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window
from lopt.meta.unroll.whole_runs import run_to_end


@dataclass(eq=False, kw_only=True)
class FullES(Evolution):
    """Every estimate runs new tasks from their start to their end, in pairs with a perturbation for the whole run.

    Its estimates cost the most and mean the most: what is minimised may be the end of a run, or its best moment.

    Attributes:
        num_steps: length of the runs; 0 (default) takes each task's horizon.
        objective: also "min", the lowest loss of the run, "tail", the mean over its last tenth, and "log_tail", the
            mean there of the log relative to the first loss.
    """

    name = "full_es"
    staggered = False
    kept = 1
    fewest_steps = 0
    objectives = (*Evolution.objectives, "min", "tail", "log_tail")

    num_steps: int = 0

    @property
    def draws_horizons(self) -> bool:
        return not self.num_steps

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with the common settings, and with tasks that all run for `num_steps` steps if that is not 0.

        Otherwise they run for the horizons that the loop draws.
        """
        loop = super().configure(loop)
        if not self.num_steps:
            return loop
        return replace(loop, horizon=self.num_steps)

    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        return draw_perturbation(loop, start.ids, episode)

    def unroll(self, loop: InnerLoop, slots: Slots) -> Window:
        """Run each pair to its own end; pairs that are there rest until the longest run is over.

        Args:
            loop: with the members' meta-weights.
            slots: of all members, at their start.
        """
        return run_to_end(loop, slots)

    def estimate(self, loop: InnerLoop, carry: Pairs) -> Estimate:
        estimate = super().estimate(loop, carry)
        # All runs are over, those that were dropped among them: there is nothing to go on with.
        slots = self.configure(loop).restart(carry.slots.ids, carry.slots.episode + 1)
        return estimate._replace(carry=carry._replace(slots=slots))
