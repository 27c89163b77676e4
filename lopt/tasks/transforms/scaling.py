"""Parameters and losses in random units: a rule should not rely on those of its training tasks."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily
from lopt.tasks.transforms.base import Transform

LEVELS = ("global", "tensor", "element")


class Scaling(Transform):
    """Base of transforms that draw factors exp(U(-range, range)) for a task, which its loss reads in every batch.

    Args:
        family: the inner family.
        scale_range: half-width of the log-uniform distribution; 0 changes nothing.
    Raises:
        ValueError: `scale_range` is negative.
    """

    def __init__(self, family: TaskFamily, scale_range: float) -> None:
        super().__init__(family)
        if scale_range < 0:
            raise ValueError(f"scale_range must not be negative, got {scale_range}")
        self.scale_range = scale_range

    def _draw_factors(self, generator: torch.Generator, *shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * self.scale_range).exp()

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return super().batch(tasks, seeds, split) | {self.key: tasks[self.key]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        batch = super().full_batch(tasks, count, split)
        return None if batch is None else batch | {self.key: tasks[self.key]}


class RandomScaling(Scaling):
    """Every task's parameters are measured in random units s = exp(U(-range, range)): p = s * z.

    The rule optimises z. It sees gradients and parameters of very different scales, which keeps it from relying on
    those of the training tasks. A task and its batches have one factor per parameter, "coordinate_scale" `[P]`; losses
    and metrics are the inner family's of p. Sources: Lv, Jiang & Li 2017, arXiv 1703.03633, section 4.1 (one unit per
    element, range 3); Moudgil et al. 2025, arXiv 2501.12670 (Celo; units from 1e-3 to 1e3).

    Args:
        family: the family whose parameters are rescaled.
        scale_range: half-width of the log-uniform distribution, by default ln 1000; 0 changes nothing.
        level: what has a unit of its own: "global" (a task), "tensor" (each tensor of a task) or "element".
    Raises:
        ValueError: `scale_range` is negative, or `level` unknown.
    """

    name = "random_scaling"
    key = "coordinate_scale"

    def __init__(self, family: TaskFamily, scale_range: float = log(1000), level: str = "element") -> None:
        super().__init__(family, scale_range)
        self.level = choose("level", level, LEVELS)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task = self.family.sample(generator, pool)
        spec = self.family.spec
        count = {"global": 1, "tensor": len(spec.names), "element": spec.size}[self.level]
        scale = self._draw_factors(generator, count)
        if self.level == "global":
            scale = scale.repeat(spec.size)
        elif self.level == "tensor":
            sizes = torch.tensor([torch.Size(shape).numel() for shape in spec.shapes], dtype=torch.int64)
            scale = scale.repeat_interleave(sizes)
        return task | {self.key: scale}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        params = super().init(task, generator)
        scale = self.family.spec.unflatten(task[self.key])
        return {name: p / scale[name] for name, p in params.items()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return super().loss(self._unscale(params, batch), batch)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return super().losses(self._unscale(params, batch), batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return super().metrics(self._unscale(params, batch), batch)

    def _unscale(self, params: Params, batch: Batch) -> Params:
        scale = self.family.spec.unflatten(batch[self.key])
        return {name: p * scale[name] for name, p in params.items()}


class LossScaling(Scaling):
    """Every task's losses, and so its gradients, have a random factor exp(U(-range, range)); metrics do not.

    For rules that should not rely on the scale of a loss. A task and its batches have the factor `[]` as "loss_scale".

    Args:
        family: the family whose losses are scaled.
        scale_range: half-width of the log-uniform distribution, by default ln 10; 0 changes nothing.
    Raises:
        ValueError: `scale_range` is negative.
    """

    name = "loss_scaling"
    key = "loss_scale"

    def __init__(self, family: TaskFamily, scale_range: float = log(10)) -> None:
        super().__init__(family, scale_range)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task = super().sample(generator, pool)
        return task | {self.key: self._draw_factors(generator)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return batch[self.key] * super().loss(params, batch)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return batch[self.key] * super().losses(params, batch)
