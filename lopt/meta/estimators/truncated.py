"""Truncated backpropagation through time: K steps at a time, tasks carried over from window to window.

Source: Andrychowicz et al. 2016, arXiv 1606.04474 (K = 20 of 100 steps).
"""

from __future__ import annotations

from torch import Tensor

from lopt.meta.estimators.backprop import Backprop
from lopt.meta.estimators.base import Estimate
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots


class Truncated(Backprop):
    """Windows of `num_steps` steps; gradients stop at their borders, parameters and states go on.

    Slots are staggered, so that one window sees all phases of training, and one that ends restarts at once. Short
    windows are cheap and of little noise, but biased towards greedy rules.
    """

    name = "truncated"
    truncates = True

    def start(self, loop: InnerLoop, ids: Tensor) -> Slots:
        return self.configure(loop).start(ids, stagger=True)

    def estimate(self, loop: InnerLoop, carry: Slots) -> Estimate:
        return self.backpropagate(self.configure(loop), carry, self.num_steps, restart=True)
