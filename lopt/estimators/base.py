"""What an estimator is: where the meta-gradient comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from lopt.rules import Rule
from lopt.tasks import TaskFamily
from lopt.tensors import Params
from lopt.unroll import Horizon, Slots


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

    An estimator is pure: all that goes on between calls is in `Slots`, and all draws are named by `seed`.
    """

    name: ClassVar[str]

    @abstractmethod
    def start(
        self,
        rule: Rule,
        family: TaskFamily,
        num_tasks: int,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Slots:
        """The slots before the first estimate."""

    @abstractmethod
    def estimate(
        self,
        rule: Rule,
        family: TaskFamily,
        slots: Slots,
        seed: int,
        horizon: Horizon | None = None,
    ) -> Estimate:
        """The meta-gradient on the next window of `slots`, which is left as it was.

        Args:
            rule: its parameters are differentiated; they are not changed and their `.grad` is not used.
            horizon: draws the horizons of tasks that start in this window; the family's own by default.
        """
