"""Backpropagation through whole runs: exact, and as long and as large as the runs."""

from __future__ import annotations

from dataclasses import replace

import torch

from lopt.estimators.backprop import Backprop
from lopt.estimators.base import Estimate
from lopt.unroll import InnerLoop, Slots


class Full(Backprop):
    """Every estimate runs new tasks for `num_steps` steps from their start and differentiates through all of them.

    `num_steps` is the length of the run; horizons are not used. `checkpoint="update"` bounds its memory.
    """

    name = "full"

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """As `Backprop.configure`; every task runs for `num_steps` steps."""
        return replace(super().configure(loop), horizon=lambda seeds: torch.full_like(seeds, self.num_steps))

    def start(self, loop: InnerLoop, num_tasks: int) -> Slots:
        """See `Estimator.start`."""
        return self.configure(loop).start(torch.arange(num_tasks))

    def estimate(self, loop: InnerLoop, slots: Slots) -> Estimate:
        """See `Estimator.estimate`."""
        loop = self.configure(loop)
        estimate = self.backpropagate(loop, slots, self.num_steps, restart=False)
        return estimate._replace(slots=loop.restart(slots.ids, slots.episode + 1))
