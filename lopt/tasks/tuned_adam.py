"""What tuned Adam reaches on the families of `TASKS` with their default options: the archive `levels.json`.

`python -m bench levels` makes it. Rules are comparable between families in units of Adam's progress.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARCHIVE = Path(__file__).parent / "tuned_adam.json"
COMMAND = "python -m bench levels"
FREE = ("horizon",)
"""Options of families that do not change what is learned."""


LEAST_PROGRESS = 0.1
"""Below a fall of the loss by a tenth, what is left to divide by is mostly noise."""


@dataclass(frozen=True)
class Level:
    """Adam with a tuned constant learning rate on the tasks of a family, averaged over them.

    Attributes:
        config: of the family.
        horizon: steps made.
        lr: the learning rate whose loss at the end is lowest.
        tuning_seeds: tasks that `lr` was tuned on.
        num_seeds: other tasks, that the losses are averaged over.
        first: loss before the first update, on a batch, averaged as `losses` are.
        final: mean loss of the last parameters, on the whole train split.
        mean: mean loss over steps 1 to `horizon`, on the batch of each step.
        average: that `first` and `losses` are: "geometric", or "arithmetic" where a loss is not positive.
        steps, losses: the training curve: the loss after 1 to `horizon` steps.
        versions: of all that measured it.
    """

    config: dict[str, Any]
    horizon: int
    lr: float
    tuning_seeds: int
    num_seeds: int
    first: float
    final: float
    mean: float
    average: str
    steps: list[int]
    losses: list[float]
    versions: dict[str, str]

    @cached_property
    def _log_curve(self) -> Tensor:
        """The logarithm of the loss after 0, 1, ..., `horizon` steps; it begins as after 1 step."""
        every = np.log(np.maximum(np.arange(self.horizon + 1), 1))
        return torch.from_numpy(np.interp(every, np.log(self.steps), np.log(self.losses)))

    def read_log_losses(self, steps: Tensor) -> Tensor:
        """Logarithms of the loss after so many steps, float64 on the device of `steps`, an int64 tensor.

        Interpolated in the logarithms of step and loss; from `horizon` on the loss stays where it is. Of a geometric
        mean only.
        """
        return self._log_curve.to(steps.device)[steps.clamp(0, self.horizon)]

    @property
    def progress(self) -> float:
        """How far the logarithm of the loss falls over the whole curve, `LEAST_PROGRESS` at least."""
        return max(math.log(self.first / self.losses[-1]), LEAST_PROGRESS)


@cache
def load_levels() -> dict[str, Level]:
    """The archive, by the families' names."""
    content = json.loads(ARCHIVE.read_text())
    return {name: Level(**entry) for name, entry in content["families"].items()}


def find_level(name: str, config: Mapping[str, Any]) -> Level | None:
    """That of a family, or None if the archive has none with options that make the same tasks."""
    level = find_nearest_level(name)
    return level if level is not None and _keep_binding(level.config) == _keep_binding(config) else None


def find_nearest_level(name: str) -> Level | None:
    """That of the family with its default options, whatever the options; None if the archive has none."""
    return load_levels().get(name)


def _keep_binding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in FREE}
