"""What tuned Adam reaches on the families of `TASKS` with their default options: the archive `tuned_adam.json`.

`python -m bench levels` measures it. Losses of rules are comparable between families in units of Adam's progress, which
the objective "baseline" of meta-training and the catalogue of tasks use. A family that has not been measured works in
everything else.
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
class TunedAdam:
    """What Adam with a tuned constant learning rate reaches on the tasks of a family, averaged over them.

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
        """Logarithms of the loss after so many steps, to compare a rule's with at each task's own step.

        Interpolated in the logarithms of step and loss; from `horizon` on the loss stays where it is. For curves of a
        geometric mean only.

        Args:
            steps: int64 `[...]`, from 0.
        Returns:
            float64 of the same shape, on the same device.
        """
        return self._log_curve.to(steps.device)[steps.clamp(0, self.horizon)]

    @property
    def progress(self) -> float:
        """How far the logarithm of the loss falls over the whole curve: the unit that a rule's progress is measured in.

        At least `LEAST_PROGRESS`, so that a family on which Adam hardly moves does not outweigh all others.
        """
        return max(math.log(self.first / self.losses[-1]), LEAST_PROGRESS)


@cache
def load_archive() -> dict[str, TunedAdam]:
    """All that has been measured, by the families' names in the order of `TASKS`; read once.

    Families that have been added since `python -m bench levels` last ran are missing: that is no error here.
    """
    content = json.loads(ARCHIVE.read_text())
    return {name: TunedAdam(**entry) for name, entry in content["families"].items()}


def find_measured(name: str, config: Mapping[str, Any]) -> TunedAdam | None:
    """What tuned Adam reaches on the tasks that a family makes with these options.

    Args:
        name: of the family in `TASKS`.
        config: its options; those in `FREE` may differ from the archive's.
    Returns:
        None if the family has not been measured, or with other options.
    """
    entry = find_default(name)
    return entry if entry is not None and _keep_binding(entry.config) == _keep_binding(config) else None


def find_default(name: str) -> TunedAdam | None:
    """What tuned Adam reaches on a family with its default options; None if it has not been measured.

    Args:
        name: of the family in `TASKS`.
    """
    return load_archive().get(name)


def _keep_binding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in FREE}
