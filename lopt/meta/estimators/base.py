"""What an estimator is: where the meta-gradient comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import Rule

Carry = Any
"""What goes on from one estimate to the next: a tuple (of tuples, dicts, ...) of tensors, `Slots` or more."""


Kind = TypeVar("Kind", bound="Estimator")


class Estimate(NamedTuple):
    """A meta-gradient and what it cost.

    Attributes:
        gradient: one tensor per meta-weight, by name: the mean over `num_tasks` tasks.
        num_tasks: tasks that were not dropped; 0 where none was finite, and then the gradient is 0.
        carry: the tasks in progress, to be handed to the next call.
        metrics: numbers to log: `meta_loss` (mean loss over the window relative to the tasks' first losses), `loss`,
            `objective` (what is minimised), all means over `num_tasks`, `skipped_slots`, `finished_tasks`,
            `inner_steps` (steps x tasks, each member of a pair counted), and what else the estimator knows.
    """

    gradient: Params
    num_tasks: int
    carry: Carry
    metrics: dict[str, float]


class Estimator(ABC):
    """Estimates the gradient of a rule's meta-loss over a family of tasks.

    An estimator is pure: all that goes on between calls is in the carry, and all draws are named by the loop's seed
    and the slots' global numbers. So a carry resumes bitwise, and the slots may be shared out among processes.
    """

    name: ClassVar[str]
    teacher: Rule | None = None

    def to(self: Kind, device: torch.device | str) -> Kind:
        """Move the tensors that the estimator holds (not carries) to `device`; the estimator itself comes back."""
        self.teacher = None if self.teacher is None else self.teacher.to(device)
        return self

    def _set_guidance(self, teacher: Rule | None, imitation: float, follow: float) -> None:
        """Keep a rule to imitate, the weight of its imitation loss, and the share of tasks that take its steps.

        Raises:
            ValueError: a weight or a share without a teacher.
        """
        if teacher is None and (imitation or follow):
            raise ValueError("imitation and follow need a teacher")
        self.teacher, self.imitation, self.follow = teacher, imitation, follow

    @abstractmethod
    def start(self, loop: InnerLoop, ids: Tensor) -> Carry:
        """The carry before the first estimate.

        Args:
            loop: rule, family, seed and horizons; the estimator sets the rest.
            ids: global numbers of the slots, int64 `[T]`, on the device of rule and family.
        """

    @abstractmethod
    def estimate(self, loop: InnerLoop, carry: Carry) -> Estimate:
        """The meta-gradient on the next window of the tasks in `carry`, which is left as it was.

        The rule's parameters are differentiated; they are not changed and their `.grad` is not used.
        """
