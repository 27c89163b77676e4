"""How long the tasks of meta-training are: constant, log-uniform, or growing with success.

A schedule draws the horizons of new tasks from seeds and hears of every validation; how many of them improved on
the best so far is all it remembers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        """Hear whether the latest validation improved on the best so far."""
        self.improved += improved

    @property
    def stage(self) -> int:
        """Index of the present stage; always 0 for schedules that have none."""
        return 0

    @property
    @abstractmethod
    def longest(self) -> int:
        """The longest horizon that it can draw."""

    @abstractmethod
    def __call__(self, seeds: Tensor) -> Tensor:
        """Horizons `[T]` int64 for tasks with the given seeds `[T]`."""


class Constant(HorizonSchedule):
    """Every task runs for `steps` steps."""

    name = "constant"

    def __init__(self, steps: int = 100) -> None:
        self.steps = _positive("steps", steps)

    @property
    def longest(self) -> int:
        """See `HorizonSchedule`."""
        return self.steps

    def __call__(self, seeds: Tensor) -> Tensor:
        """See `HorizonSchedule`."""
        return torch.full_like(seeds, self.steps)


class LogUniform(HorizonSchedule):
    """Horizons log-uniform in [low, high]: short and long runs in equal shares per octave.

    Args:
        shared: one horizon for all slots' n-th tasks. Evolution strategies on whole runs then keep their batch full to
            the end, instead of finishing the longest run almost alone.
    """

    name = "log_uniform"

    def __init__(self, low: int = 50, high: int = 500, shared: bool = False) -> None:
        self.low, self.high, self.shared = _positive("low", low), _positive("high", high), shared
        if high < low:
            raise ValueError(f"high must be at least low, got low={low} and high={high}")

    @property
    def longest(self) -> int:
        """See `HorizonSchedule`."""
        return self.high

    def __call__(self, seeds: Tensor) -> Tensor:
        """See `HorizonSchedule`."""
        u = draw_uniform(seeds, 1)[..., 0]
        return (self.low * ((self.high + 1) / self.low) ** u).long().clamp(max=self.high)


class Curriculum(HorizonSchedule):
    """Stages of growing horizons; a stage is left only when a validation improves on the best so far.

    Source: Chen et al. 2020, arXiv 2010.09089, section 3 (100, 200, 500, 1000, ...).

    Args:
        stages: horizons, increasing.
        improvements: how many lead to the next stage.
    """

    name = "curriculum"

    def __init__(self, stages: tuple[int, ...] = (100, 200, 500), improvements: int = 1) -> None:
        if not stages or list(stages) != sorted(set(stages)):
            raise ValueError(f"stages must be increasing, got {list(stages)}")
        for steps in stages:
            _positive("stages", steps)
        self.stages = tuple(stages)
        self.improvements = _positive("improvements", improvements)

    @property
    def stage(self) -> int:
        """Index into `stages`; the last one is never left."""
        return min(self.improved // self.improvements, len(self.stages) - 1)

    @property
    def longest(self) -> int:
        """See `HorizonSchedule`."""
        return self.stages[-1]

    def __call__(self, seeds: Tensor) -> Tensor:
        """See `HorizonSchedule`."""
        return torch.full_like(seeds, self.stages[self.stage])


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


HORIZONS: dict[str, type[HorizonSchedule]] = {
    "constant": Constant,
    "log_uniform": LogUniform,
    "curriculum": Curriculum,
}
