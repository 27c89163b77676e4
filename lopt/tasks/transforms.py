"""Task transforms: families made from other families, to train rules on more than the tasks that there are.

Transforms can be applied to one another, each kind once. They leave shapes, splits, horizon and metrics as they are.
"""

from __future__ import annotations

from math import log
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import draw_normal
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.tuned_adam import TunedAdam

T = TypeVar("T", bound="Transform")

LEVELS = ("global", "tensor", "element")
NOISE = 1000
"""The branch of a batch's seeds that the gradient's noise is drawn from."""


class Transform(TaskFamily):
    """Base of families with the tasks of another one, changed: by default not at all.

    Every method hands on to the inner family; a transform overrides those it changes and calls `super()`. What it adds
    to a task and to a batch has the name `key` there, which the inner family does not see. In `config` the inner family
    is its description.

    Args:
        family: the inner family.
    Raises:
        ValueError: the inner family has been transformed in this way already.
    """

    key: ClassVar[str]

    def __init__(self, family: TaskFamily) -> None:
        self.config["family"] = family.describe()
        self.family, self.horizon, self.examples = family, family.horizon, family.examples
        self.judged, self.pool_key = family.judged, family.pool_key
        inner: TaskFamily = family
        while isinstance(inner, Transform):
            if inner.key == self.key:
                raise ValueError(
                    f"{self.name} is applied twice, to {family.describe()}; apply it once, with more range"
                )
            inner = inner.family

    def _inner(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the inner family may see of a task or a batch."""
        return {key: value for key, value in tensors.items() if key != self.key}

    def to(self: T, device: torch.device | str) -> T:
        self.family = self.family.to(device)
        return self

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return self.family.sample(generator, pool)

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return self.family.init(self._inner(task), generator)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return self.family.batch(self._inner(tasks), seeds, split)

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        return self.family.full_batch(self._inner(tasks), count, split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.family.loss(params, self._inner(batch))

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.family.losses(params, self._inner(batch))

    def deliver(self, tasks: Task, grads: Tensor, steps: Tensor) -> tuple[Task, Tensor]:
        inner, grads = self.family.deliver(self._inner(tasks), grads, steps)
        return tasks | inner, grads

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return self.family.metrics(params, self._inner(batch))

    @property
    def baseline(self) -> TunedAdam | None:
        """The inner family's: what tuned Adam reaches on the tasks as they were, without the transform.

        Factors of the loss average out in it, so that transformed tasks are measured in the same unit of progress.
        """
        return self.family.baseline

    @property
    def nearest_baseline(self) -> TunedAdam | None:
        return self.family.nearest_baseline


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


TRANSFORMS: dict[str, type[Transform]] = {
    "random_scaling": RandomScaling,
    "gradient_noise": GradientNoise,
    "reduced_batch": ReducedBatch,
    "loss_scaling": LossScaling,
    "stale_gradients": StaleGradients,
}
