"""Gradients as they are in rough weather: with noise, from smaller batches, late."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from lopt.core.random import draw_normal
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.transforms.base import Transform

NOISE = 1000
"""The branch of a batch's seeds that the gradient's noise is drawn from."""


class GradientNoise(Transform):
    """The rule sees gradients with Gaussian noise; the losses are as they were.

    The noise, "gradient_noise" `[T, P]` in a batch, is drawn anew for every step, and only in batches of the train
    split: other splits, and whole splits, have right gradients. The meta-gradient of a first-order unroll is made of
    the same gradients, so on the train split it is noisy, too, without bias.

    Args:
        family: the family whose gradients are disturbed.
        std: standard deviation of the noise of every element of the gradient.
    Raises:
        ValueError: `std` is negative.
    """

    name = "gradient_noise"
    key = "gradient_noise"

    def __init__(self, family: TaskFamily, std: float = 0.01) -> None:
        super().__init__(family)
        if std < 0:
            raise ValueError(f"std must not be negative, got {std}")
        self.std = std

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        if split != "train":
            return batch
        noise = self.std * draw_normal(branch_seeds(seeds, NOISE), self.family.spec.size)
        return batch | {self.key: noise.float()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return super().loss(params, batch) + self._tilt(params, batch)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return super().losses(params, batch) + self._tilt(params, batch)

    def _tilt(self, params: Params, batch: Batch) -> Tensor | float:
        """0 with the noise as its gradient, or 0 without noise."""
        if self.key not in batch:
            return 0.0
        flat = self.family.spec.flatten(params)
        # Linear in the parameters, with the noise as slope, and 0 where they are: only the gradient changes.
        return (batch[self.key] * (flat - flat.detach())).sum(-1)


class ReducedBatch(Transform):
    """Every task learns from smaller batches, of a random share of their examples: noisier gradients, at equal cost.

    The first examples of a batch, at least one, stand in for the others, so shapes stay what they are; each counts
    equally but for the remainder of the division. Only batches of the train split are reduced. A task has its share
    `[]` as "batch_share".

    Args:
        family: the family whose batches are reduced; its batches must consist of examples.
        smallest: the least share, in (0, 1]; shares are log-uniform from here to 1.
    Raises:
        ValueError: the family's batches are no examples (its losses are exact), or `smallest` is not in (0, 1].
    """

    name = "reduced_batch"
    key = "batch_share"

    def __init__(self, family: TaskFamily, smallest: float = 1 / 16) -> None:
        super().__init__(family)
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest must be above 0 and at most 1, got {smallest}")
        if not family.examples:
            raise ValueError(f"{family.describe()} has no batches of examples that could be reduced")
        self.smallest = smallest

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task = super().sample(generator, pool)
        return task | {self.key: (torch.rand((), generator=generator, dtype=torch.float32) * log(self.smallest)).exp()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        if split != "train":
            return batch
        size = batch[self.examples[0]].shape[1]
        share = tasks[self.key]
        # Repeats instead of a shorter batch: all tasks of a population must have equal shapes.
        count = (share * size).round().clamp(min=1).long()
        index = torch.arange(size, device=share.device) % count[:, None]
        task = torch.arange(len(share), device=share.device)[:, None]
        return batch | {key: batch[key][task, index] for key in self.examples}


class StaleGradients(Transform):
    """The rule sees gradients late, as in asynchronous training: those of some steps ago; losses are as they were.

    In a task's first steps it sees the gradient of its beginning. A task has its number of steps, "gradient_delay" `[]`
    int64, and keeps its last `high` gradients, "late_gradients" `[high, P]`, oldest first.

    Args:
        family: the family whose gradients are late.
        low, high: least and largest number of steps; each task's is uniform between them, both included.
    Raises:
        ValueError: not 0 <= low <= high.
    """

    name = "stale_gradients"
    key = "late_gradients"
    delay = "gradient_delay"

    def __init__(self, family: TaskFamily, low: int = 0, high: int = 4) -> None:
        super().__init__(family)
        if not 0 <= low <= high:
            raise ValueError(f"low must be from 0 to high, got low={low} and high={high}")
        self.low, self.high = low, high

    def _inner(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if key not in (self.key, self.delay)}

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task = super().sample(generator, pool)
        delay = torch.randint(self.low, self.high + 1, (), generator=generator)
        return task | {self.delay: delay, self.key: torch.zeros(self.high, self.family.spec.size, dtype=torch.float32)}

    def deliver(self, tasks: Task, grads: Tensor, steps: Tensor) -> tuple[Task, Tensor]:
        tasks, grads = super().deliver(tasks, grads, steps)
        begins = (steps == 0)[:, None, None]
        # An episode's first gradient stands for those before it, and what the memory held is of the episode before.
        history = torch.cat([torch.where(begins, grads[:, None], tasks[self.key]), grads[:, None]], 1)
        task = torch.arange(len(steps), device=steps.device)
        return tasks | {self.key: history[:, 1:]}, history[task, self.high - tasks[self.delay]]
