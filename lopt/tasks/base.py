"""What a task is: a base learner with its data, drawn from a family of tasks of equal shapes.

A task is a dict of tensors: what distinguishes it from others of its family (for a quadratic its matrix, for a
classifier nothing: its initial parameters and its batches make it what it is). Losses are written for one
task and batched over tasks with `torch.func.vmap`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from lopt.core.tensors import Params, ParamSpec, fold_in, make_generator
from lopt.tasks.tuned_adam import Level, find_level, find_nearest_level

Task = dict[str, Tensor]
Batch = dict[str, Tensor]
Data = tuple[Tensor, Tensor]
"""Inputs `[n, ...]` and targets `[n, ...]`."""

Family = TypeVar("Family", bound="TaskFamily")

SPLITS = ("train", "inner_valid", "outer_valid", "test")

BRANCHES = 2**32
"""Above the lanes of `draw_uniform`: a branch's seed is none of the numbers that are drawn from the seed itself."""


class TaskFamily(ABC):
    """A distribution over tasks; `config` rebuilds it: `TASKS[name](**config)`.

    `sample` and `init` draw on the CPU; `batch` and `full_batch` return tensors on the device of the seeds and tasks
    that they are given, to which `to` must have moved what the family holds.

    Attributes:
        horizon: number of steps that a task of this family is meant to be trained for.
        examples: the entries `[T, B, ...]` of a batch whose B rows are examples that the loss is a mean over.
    """

    name: ClassVar[str]
    horizon: int = 100
    examples: tuple[str, ...] = ()

    def __init__(self, **config: Any) -> None:
        self.config = config

    def sample(self, generator: torch.Generator) -> Task:
        """Draw one task: tensors without batch dimension; `{}` if all tasks share everything but their draws."""
        return {}

    def to(self: Family, device: torch.device | str) -> Family:
        """Move the tensors that the family holds (data, not tasks) to `device`; the family itself comes back."""
        return self

    @abstractmethod
    def init(self, task: Task, generator: torch.Generator) -> Params:
        """Draw initial parameters of one task."""

    @abstractmethod
    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """The mini-batches of T tasks.

        Args:
            tasks: tensors `[T, ...]`; what `deliver` remembers there is not read, as batches of later steps are drawn
                before it changes.
            seeds: int64 `[T]`; equal seeds give equal batches.
            split: one of `SPLITS`.
        Returns:
            What `loss` reads, tensors `[T, ...]`.
        """

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Scalar loss of one task on one batch; pure and differentiable."""

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Losses `[T]` of T tasks, from parameters and batches `[T, ...]`: `loss` batched with `vmap`, or faster."""
        return vmap(self.loss)(params, batch)

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        """The whole split for `count` tasks, `[count, ...]`; None where a batch is already exact."""
        return None

    def deliver(self, tasks: Task, grads: Tensor, steps: Tensor) -> tuple[Task, Tensor]:
        """What a rule sees of the gradients of T tasks: here the gradients themselves.

        Args:
            tasks: tensors `[T, ...]`, which may hold memory that goes on from step to step.
            grads: `[T, P]`, of the train split, right for the parameters before step `steps`, int64 `[T]`.
        Returns:
            The tasks with their memory after this step, and gradients `[T, P]`.
        """
        return tasks, grads

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Further scalars of one task on one batch, such as accuracy."""
        return {}

    @cached_property
    def spec(self) -> ParamSpec:
        """Names and shapes of the parameters."""
        generator = make_generator(0)
        return ParamSpec.of(self.init(self.sample(generator), generator))

    @property
    def baseline(self) -> Level | None:
        """What tuned Adam reaches on these tasks; None if the archive does not have it."""
        return find_level(self.name, self.config)

    @property
    def nearest_baseline(self) -> Level | None:
        """The same, or where these options are not archived that of the family with its default options."""
        return find_nearest_level(self.name)

    def describe(self) -> str:
        """One line: the family's name and configuration."""
        config = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"{self.name}({config})"


def branch_seeds(seeds: Tensor, branch: int) -> Tensor:
    """Seeds of the same shape for a further kind of draws, such as noise; `branch` names it within a family."""
    return fold_in(seeds, torch.tensor(BRANCHES + branch))


def check_split(split: str) -> str:
    """`split` itself, if it is one.

    Raises:
        ValueError: it is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return split
