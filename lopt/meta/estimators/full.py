"""Backpropagation through whole runs: exact, and as long and as large as the runs.

Where runs are long, its memory is the limit, and chaotic runs make its gradients explode; what it says of short runs is
what all other estimators are measured against.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lopt.meta.estimators.backprop import Backprop
from lopt.meta.estimators.base import Estimate
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots


class Full(Backprop):
    """Every estimate runs new tasks for `num_steps` steps from their start and differentiates through all of them.

    `num_steps` is the length of the run; horizons are not used. `checkpoint="update"` bounds its memory.
    """

    name = "full"

    @property
    def draws_horizons(self) -> bool:
        return False

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with this estimator's settings, and with tasks that all run for `num_steps` steps.

        A rule that looks at progress sees that length as the horizon.
        """
        return replace(super().configure(loop), carries=False, horizon=self.num_steps)

    def start(self, loop: InnerLoop, ids: Tensor) -> Slots:
        return self.configure(loop).start(ids)

    def estimate(self, loop: InnerLoop, carry: Slots) -> Estimate:
        loop = self.configure(loop)
        estimate = self.backpropagate(loop, carry, self.num_steps, restart=False)
        return estimate._replace(carry=loop.restart(carry.ids, carry.episode + 1))
