"""What an estimator is: where the meta-gradient comes from.

The flow of meta-training: a `TaskFamily` gives tasks, which run in slots; `InnerLoop` takes the slots through a window
of steps under a rule (`lopt.meta.unroll`); an `Estimator` makes a meta-gradient of the window's losses; the `Trainer`
merges those of all sources and ranks and steps the rule's meta-weights with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.meta.estimators.bookkeeping import METRICS
from lopt.meta.estimators.objectives import find_baseline
from lopt.meta.estimators.options import GuidanceOptions, HidingOptions, ObjectiveOptions, PrecisionOptions
from lopt.meta.unroll.inner_loop import InnerLoop

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


@dataclass(eq=False, kw_only=True)
class Estimator(ObjectiveOptions, GuidanceOptions, HidingOptions, PrecisionOptions, ABC):
    """Estimates the gradient of a rule's meta-loss over a family of tasks, a window of steps at a time.

    An estimator is pure: all that goes on between calls is in the carry, and all draws are named by the loop's seed
    and the slots' global numbers. So a carry resumes bitwise, and the slots may be shared out among processes.

    A new one is a dataclass with its own options as fields, `start` and `estimate`, and one line in `ESTIMATORS`; the
    contract tests then cover it. `Tally`, `find_finite` and `renew_sick` do what all estimators have to do.

    >>> from lopt.meta.estimators import ESTIMATORS
    >>> from lopt.rules import RULES
    >>> from lopt.tasks import TASKS
    >>> loop = InnerLoop(RULES["sgd"](lr=0.01), TASKS["quadratic"](dim=2), seed=0)
    >>> estimator = ESTIMATORS["truncated"](num_steps=5, objective="log")
    >>> estimate = estimator.estimate(loop, estimator.start(loop, torch.arange(3)))
    >>> estimate.num_tasks, bool(estimate.gradient["lr"] < 0)  # a larger rate would do better
    (3, True)

    Attributes:
        name: in `ESTIMATORS`, presets and logs.
        truncates: what a step does beyond its window is left out, so the gradient is biased if windows are short.
        metrics: names of what every estimate tells, at least.
        quick_config: options with which the contract tests run it on their small problems, beside `num_steps`.
        needs_init: is for rules that say where tasks start, and learns that alone.
        fewest_steps: what `num_steps` must be at least; 0 where that means something.
        num_steps: steps of a window, K.

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str]
    truncates: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = METRICS
    quick_config: ClassVar[Mapping[str, Any]] = {}
    needs_init: ClassVar[bool] = False
    fewest_steps: ClassVar[int] = 1

    num_steps: int = 20

    def __post_init__(self) -> None:
        ObjectiveOptions.__post_init__(self)
        GuidanceOptions.__post_init__(self)
        HidingOptions.__post_init__(self)
        PrecisionOptions.__post_init__(self)
        if self.num_steps < self.fewest_steps:
            raise ValueError(f"num_steps must be at least {self.fewest_steps}, got {self.num_steps}")

    @property
    def draws_horizons(self) -> bool:
        """Whether tasks run for the horizons that the loop draws; false where all of them run for `num_steps`."""
        return True

    def to(self: Kind, device: torch.device | str) -> Kind:
        """Move the tensors that the estimator holds to `device`; the estimator itself comes back.

        Those are a teacher's. Carries are not held: they stay where they are.
        """
        self.teacher = None if self.teacher is None else self.teacher.to(device)
        return self

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with this estimator's settings: whom tasks follow, what losses are measured on and how
        precisely, what is hidden.

        Args:
            loop: rule, family, seed, horizons and what is left of the guidance, as a source gives them.
        Raises:
            ValueError: objective "baseline" and a family without one: refused before anything runs.
        """
        if self.objective == "baseline":
            find_baseline(loop.family)
        return replace(
            loop,
            teacher=self.teacher,
            follow=self.follow * loop.guidance,
            meta_split=self.objective_split,
            meta_metric=self.objective_metric,
            hide_end=self.hide_end,
            precision=self.precision,
        )

    @abstractmethod
    def start(self, loop: InnerLoop, ids: Tensor) -> Carry:
        """The carry before the first estimate: a task in every slot, none of which has made a step.

        Args:
            loop: rule, family, seed and horizons; the estimator sets the rest.
            ids: global numbers of the slots, int64 `[T]`, on the device of rule and family.
        """

    @abstractmethod
    def estimate(self, loop: InnerLoop, carry: Carry) -> Estimate:
        """The meta-gradient on the next window of the tasks in `carry`, which is left as it was.

        The rule's parameters are differentiated; they are not changed and their `.grad` is not used.

        Args:
            loop: as given to `start`; its guidance may have fallen.
            carry: of `start` or of the estimate before.
        """
