"""What a task transform is: a family made from another one, which it hands everything on to that it does not change."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily
from lopt.tasks.tuned_adam import TunedAdam

T = TypeVar("T", bound="Transform")


class Transform(TaskFamily):
    """Base of families with the tasks of another one, changed: by default not at all.

    Every method hands on to the inner family; a transform overrides those it changes and calls `super()`. What it adds
    to a task and to a batch has the name `key` there, which the inner family does not see. In `config` the inner family
    is its description.

    Args:
        family: the inner family.
    Raises:
        ValueError: the inner family has been transformed in this way already, or is a black box.
    """

    key: ClassVar[str]

    def __init__(self, family: TaskFamily) -> None:
        self.config["family"] = family.describe()
        self.family, self.horizon, self.examples = family, family.horizon, family.examples
        self.judged, self.pool_key, self.pools = family.judged, family.pool_key, family.pools
        if family.black_box:
            raise ValueError(
                f"{self.name} changes losses and their derivatives, and {family.name!r} has estimates of them"
            )
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

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        inner = self._inner(tasks)
        own = {key: value for key, value in tasks.items() if key not in inner}
        return own | self.family.drift(inner, steps)

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
