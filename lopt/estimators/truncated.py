"""Truncated backpropagation through time: K steps at a time, tasks carried over from window to window.

Source: Andrychowicz et al. 2016, arXiv 1606.04474 (K = 20 of 100 steps).
"""

from __future__ import annotations

import torch

from lopt.estimators.backprop import Backprop
from lopt.estimators.base import Estimate
from lopt.rules import Rule
from lopt.tasks import TaskFamily
from lopt.unroll import Horizon, Slots


class Truncated(Backprop):
    """Windows of `num_steps` steps; gradients stop at their borders, parameters and states go on.

    Slots are staggered, so that one window sees all phases of training, and one that ends restarts at once.
    """

    name = "truncated"

    def start(
        self,
        rule: Rule,
        family: TaskFamily,
        num_tasks: int,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Slots:
        """See `Estimator.start`."""
        index = torch.arange(num_tasks)
        return self.loop(rule, family, seed, horizon).start(index, stagger=True)

    def estimate(
        self,
        rule: Rule,
        family: TaskFamily,
        slots: Slots,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Estimate:
        """See `Estimator.estimate`."""
        loop = self.loop(rule, family, seed, horizon)
        return self.backpropagate(loop, slots, self.num_steps, restart=True)
