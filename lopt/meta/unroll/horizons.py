"""How long the tasks of meta-training are: constant, log-uniform, or growing with success.

A schedule draws the horizons of new tasks from seeds and hears of every validation; how many of them improved on
the best so far is all it remembers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopt.core.random import draw_uniform


class HorizonSchedule(ABC):
    """Draws horizons; calling it makes it a `lopt.meta.unroll.inner_loop.Horizon`.

    Attributes:
        shared: the tasks that all slots make in one turn have one horizon; otherwise each task has its own.
        improved: validations so far that improved on the best before them; to be saved and restored.
    """

    name: ClassVar[str]
    improved: int = 0
    shared: bool = False

    def validated(self, improved: bool) -> None:
        """Hear whether the latest validation improved on the best so far.

        The trainer says so after every validation but the one before the first step. It changes horizons of tasks that
        start later, and not those in progress.
        """
        self.improved += improved

    @property
    def stage(self) -> int:
        """Index of the present stage, which is logged with every step; always 0 for schedules that have none.

        It follows from `improved`, so that a checkpoint only has to hold that.
        """
        return 0

    @property
    @abstractmethod
    def longest(self) -> int:
        """The longest horizon that it can ever draw.

        It goes into a rule's card: what the rule has seen of progress and time reaches as far.
        """

    @abstractmethod
    def __call__(self, seeds: Tensor) -> Tensor:
        """Draw the horizons of new tasks, `[T]` int64 of at least 1.

        Args:
            seeds: `[T]` int64, one of each task; equal seeds give equal horizons as long as the stage is the same.
        """


@dataclass(eq=False)
class Constant(HorizonSchedule):
    """Every task runs for `steps` steps: for rules that are meant for runs of one length.

    Args:
        steps: at least 1.
    """

    name = "constant"

    steps: int = 100

    def __post_init__(self) -> None:
        _check_positive("steps", self.steps)

    @property
    def longest(self) -> int:
        return self.steps

    def __call__(self, seeds: Tensor) -> Tensor:
        return torch.full_like(seeds, self.steps)


@dataclass(eq=False)
class LogUniform(HorizonSchedule):
    """Horizons log-uniform in [low, high]: short and long runs in equal shares per octave.

    For rules that are to work at any length: each doubling of the length counts alike.

    Args:
        low, high: the shortest and the longest, both included.
        shared: one horizon for all slots' n-th tasks. Evolution strategies on whole runs then keep their batch full to
            the end, instead of finishing the longest run almost alone.
    """

    name = "log_uniform"

    low: int = 50
    high: int = 500
    shared: bool = False

    def __post_init__(self) -> None:
        _check_positive("low", self.low)
        _check_positive("high", self.high)
        if self.high < self.low:
            raise ValueError(f"high must be at least low, got low={self.low} and high={self.high}")

    @property
    def longest(self) -> int:
        return self.high

    def __call__(self, seeds: Tensor) -> Tensor:
        # To high + 1, so that rounding down gives the longest horizon its full share.
        u = draw_uniform(seeds, 1)[..., 0]
        return (self.low * ((self.high + 1) / self.low) ** u).long().clamp(max=self.high)


@dataclass(eq=False)
class Curriculum(HorizonSchedule):
    """Stages of growing horizons; a stage is left only when a validation improves on the best so far.

    Source: Chen et al. 2020, arXiv 2010.09089, section 3 (100, 200, 500, 1000, ...).

    Args:
        stages: horizons, increasing.
        improvements: how many lead to the next stage.
    """

    name = "curriculum"

    stages: tuple[int, ...] = (100, 200, 500)
    improvements: int = 1

    def __post_init__(self) -> None:
        if not self.stages or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages must be increasing, got {list(self.stages)}")
        _check_positive("stages", self.stages[0])
        _check_positive("improvements", self.improvements)

    @property
    def stage(self) -> int:
        """Index into `stages`; the last one is never left.

        Each stage takes as many improvements as the one before it, so that a rule that stops improving stays where it
        is.
        """
        return min(self.improved // self.improvements, len(self.stages) - 1)

    @property
    def longest(self) -> int:
        return self.stages[-1]

    def __call__(self, seeds: Tensor) -> Tensor:
        return torch.full_like(seeds, self.stages[self.stage])


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


HORIZONS: dict[str, type[HorizonSchedule]] = {
    "constant": Constant,
    "log_uniform": LogUniform,
    "curriculum": Curriculum,
}
