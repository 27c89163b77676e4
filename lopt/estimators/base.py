"""What an estimator is: where the meta-gradient comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from lopt.tensors import Params
from lopt.unroll import InnerLoop, Slots


class Estimate(NamedTuple):
    """A meta-gradient and what it cost.

    Attributes:
        gradient: one tensor per meta-weight, by name.
        slots: the tasks in progress, to be handed to the next call.
        metrics: numbers to log: `meta_loss` (mean loss over the window relative to the tasks' first losses),
            `loss`, `skipped_slots`, `finished_tasks`, `inner_steps` (steps x tasks), `imitation_loss`.
    """

    gradient: Params
    slots: Slots
    metrics: dict[str, float]


class Estimator(ABC):
    """Estimates the gradient of a rule's meta-loss over a family of tasks.

    An estimator is pure: all that goes on between calls is in `Slots`, and all draws are named by the
    loop's seed.
    """

    name: ClassVar[str]

    @abstractmethod
    def start(self, loop: InnerLoop, num_tasks: int) -> Slots:
        """The slots before the first estimate.

        Args:
            loop: rule, family, seed and horizons; the estimator sets the rest.
        """

    @abstractmethod
    def estimate(self, loop: InnerLoop, slots: Slots) -> Estimate:
        """The meta-gradient on the next window of `slots`, which is left as it was.

        The rule's parameters are differentiated; they are not changed and their `.grad` is not used.
        """
