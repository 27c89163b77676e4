"""Backpropagation through whole runs: exact, and as long and as large as the runs."""

from __future__ import annotations

import torch

from lopt.estimators.backprop import Backprop
from lopt.estimators.base import Estimate
from lopt.rules import Rule
from lopt.tasks import TaskFamily
from lopt.unroll import Horizon, Slots


class Full(Backprop):
    """Every estimate runs new tasks for `num_steps` steps from their start and differentiates through all of them.

    `num_steps` is the length of the run; horizons are not used. `checkpoint="update"` bounds its memory.
    """

    name = "full"

    def start(
        self,
        rule: Rule,
        family: TaskFamily,
        num_tasks: int,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Slots:
        """See `Estimator.start`."""
        return self.loop(rule, family, seed, None).start(torch.arange(num_tasks))

    def estimate(
        self,
        rule: Rule,
        family: TaskFamily,
        slots: Slots,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        loop = self.loop(rule, family, seed, None)
        estimate = self.backpropagate(loop, slots, self.num_steps, restart=False)
        fresh = loop.restart(slots.ids, slots.episode + 1)
        return estimate._replace(slots=fresh)
