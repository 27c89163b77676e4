"""Task transforms: families made from other families."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.tasks.base import Batch, Task, TaskFamily
from lopt.tensors import Params

SCALE = "coordinate_scale"


class RandomScaling(TaskFamily):
    """Every coordinate of every task is measured in its own random unit: p = exp(U(-range, range)) * z.

    The rule optimises z. It sees gradients and parameters of very different scales, which keeps it from relying on
    those of the training tasks. Source: Lv, Jiang & Li 2017, arXiv 1703.03633, section 4.1 (range 3).

    Args:
        family: the family whose coordinates are rescaled.
        scale_range: half-width of the log-uniform distribution; 0 changes nothing.
    """

    name = "random_scaling"

    def __init__(self, family: TaskFamily, scale_range: float) -> None:
        super().__init__(family=family.describe(), scale_range=scale_range)
        if scale_range < 0:
            raise ValueError(f"scale_range must not be negative, got {scale_range}")
        self.family, self.scale_range, self.horizon = family, scale_range, family.horizon

    def sample(self, generator: torch.Generator) -> Task:
        """The inner family's task and one factor per parameter `[P]`."""
        task = self.family.sample(generator)
        units = torch.rand(self.family.spec.size, generator=generator) * 2 - 1
        return task | {SCALE: (units * self.scale_range).exp()}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        """The inner family's parameters in the task's units."""
        params = self.family.init(_inner(task), generator)
        scale = self.family.spec.unflatten(task[SCALE])
        return {name: p / scale[name] for name, p in params.items()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """The inner family's batch with the factors."""
        return self.family.batch(_inner(tasks), seeds, split) | {SCALE: tasks[SCALE]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        """The inner family's split with the factors."""
        batch = self.family.full_batch(_inner(tasks), count, split)
        return None if batch is None else batch | {SCALE: tasks[SCALE]}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The inner family's loss."""
        return self.family.loss(*self._unscale(params, batch))

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """The inner family's metrics."""
        return self.family.metrics(*self._unscale(params, batch))

    def _unscale(self, params: Params, batch: Batch) -> tuple[Params, Batch]:
        scale = self.family.spec.unflatten(batch[SCALE])
        return {name: p * scale[name] for name, p in params.items()}, _inner(batch)


def _inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != SCALE}
