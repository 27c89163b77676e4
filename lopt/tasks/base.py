"""What a task is: a base learner with its data, drawn from a family of tasks of equal shapes.

A task is a dict of tensors: what distinguishes it from others of its family (for a quadratic its matrix, for a
classifier nothing: its initial parameters and its mini-batches make it what it is). Losses are written for one task
and batched over tasks with `torch.func.vmap`, so that meta-training runs thousands of them side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from lopt.core.names import choose
from lopt.core.random import fold_in, make_generator
from lopt.core.recorded import Recorded
from lopt.core.tensors import Params, ParamSpec, stack_trees
from lopt.tasks.tuned_adam import TunedAdam, find_default, find_measured

Task = dict[str, Tensor]
Batch = dict[str, Tensor]
Data = tuple[Tensor, Tensor]
"""Inputs `[n, ...]` and targets `[n, ...]`."""

Family = TypeVar("Family", bound="TaskFamily")

SPLITS = ("train", "inner_valid", "outer_valid", "test")
"""Parts of the data within a task."""

POOLS = ("train", "outer_valid", "test")
"""Parts of the tasks: a rule learns from the first, is chosen on the second and judged on the last."""

BRANCHES = 2**32
"""Above the lanes of `draw_uniform`: a branch's seed is none of the numbers that are drawn from the seed itself."""


class TaskFamily(Recorded, ABC):
    """A distribution over tasks that rules are trained and judged on: `TASKS[name](**family.config)` is the same again.

    Three methods make a family, `init`, `batch` and `loss`; most also draw what tells tasks apart in `sample`. Where
    the loss needs no mini-batches, derive from `ExactTask`; for any `torch.nn.Module` with a data set, `ModuleTask` is
    a family already.

    >>> import torch
    >>> from lopt.core.random import draw_normal, make_generator
    >>> from lopt.core.tensors import stack_trees
    >>> from lopt.tasks import TaskFamily
    >>> class Mean(TaskFamily):
    ...     '''Find a hidden point `[dim]` from noisy sights of it.'''
    ...     name = "mean"
    ...     def __init__(self, dim: int = 3, noise: float = 0.1):
    ...         self.dim, self.noise = dim, noise
    ...     def sample(self, generator, pool="train"):
    ...         return {"point": torch.randn(self.dim, generator=generator)}
    ...     def init(self, task, generator):
    ...         return {"x": torch.zeros(self.dim)}
    ...     def batch(self, tasks, seeds, split="train"):
    ...         return {"sight": tasks["point"] + self.noise * draw_normal(seeds, self.dim).float()}
    ...     def loss(self, params, batch):
    ...         return (params["x"] - batch["sight"]).square().sum()
    >>> family = Mean(dim=2)
    >>> family.describe()
    'mean(dim=2, noise=0.1)'
    >>> tasks = stack_trees([family.sample(make_generator(i)) for i in range(4)])
    >>> params = stack_trees([family.init({}, make_generator(i)) for i in range(4)])
    >>> family.losses(params, family.batch(tasks, seeds=torch.arange(4))).shape
    torch.Size([4])

    `sample` and `init` draw on the CPU; `batch` and `full_batch` return tensors on the device of the seeds and tasks
    that they are given, to which `to` must have moved what the family holds.

    Attributes:
        name: the family's name in `TASKS`.
        horizon: number of steps that a task of this family is meant to be trained for.
        examples: the entries `[T, B, ...]` of a batch whose B rows are examples that the loss is a mean over.
        judged: the split whose losses say how good a base learner is: the one that it learns from, or "inner_valid"
            where a task has so few examples that it may know them by heart.
        pool_key: the entry of a task, int64, that has no value in common with tasks of another pool; None where all
            pools are the same, as there is no end of tasks.
        pools: the values of that entry, by pool.
    """

    name: ClassVar[str]
    horizon: int = 100
    examples: tuple[str, ...] = ()
    judged: str = "train"
    pool_key: str | None = None
    pools: Mapping[str, Sequence[int]] = MappingProxyType({})

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """Draw what tells one task from the others of its family, such as the matrix of a quadratic.

        Args:
            generator: on the CPU, the only source of randomness, so that a seed names a task.
            pool: one of `POOLS`; families without a `pool_key` draw the same whatever it is.
        Returns:
            Tensors without batch dimension; `{}`, the default, if tasks differ only in initial parameters and batches.
        """
        return {}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        """T tasks, `[T, ...]` on the CPU: those of `sample`, one after the other.

        Families override it where many are drawn faster at once; a task must not depend on its company.

        Args:
            seeds: int64 `[T]` on the CPU; equal seeds are equal tasks.
            pool: one of `POOLS`.
        """
        return stack_trees(self.sample(make_generator(seed), pool) for seed in seeds)

    def to(self: Family, device: torch.device | str) -> Family:
        """Move the tensors that the family itself holds, such as data sets, to where its tasks will be trained.

        Tasks and parameters are drawn on the CPU whatever the device; their user moves them.

        Returns:
            The family itself, changed in place.
        """
        return self

    @abstractmethod
    def init(self, task: Task, generator: torch.Generator) -> Params:
        """Draw the parameters that one task starts from.

        Args:
            task: from `sample`, without batch dimension.
            generator: on the CPU, the only source of randomness.
        Returns:
            Tensors of the same names and shapes for all tasks of the family, without batch dimension.
        """

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        """T tasks as they are at a step, for families whose tasks change while they are learned; here they do not.

        What it returns is what `batch` and `full_batch` are given.

        Args:
            tasks: tensors `[T, ...]` as they were drawn; entries that only tell how a task changes may be left out.
            steps: int64 `[T]`, made before the batch is seen. Nothing else may matter, as steps are asked for in any
                order and ahead of time, and there is no last one.
        """
        return tasks

    @abstractmethod
    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """The mini-batches of T tasks for one step.

        Args:
            tasks: tensors `[T, ...]`, from `drift`; what `deliver` remembers there is not read, as batches of later
                steps are drawn before it changes.
            seeds: int64 `[T]`; equal seeds give equal batches.
            split: one of `SPLITS`.
        Returns:
            What `loss` reads, tensors `[T, ...]`.
        Raises:
            ValueError: there is no such split.
        """

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Scalar loss of one task on one batch: what the base learner minimises, pure and differentiable.

        Args:
            params: tensors of the shapes that `init` draws.
            batch: one task's share of what `batch` returns, without the dimension `[T]`.
        """

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Losses `[T]` of T tasks, from parameters and batches `[T, ...]`: `loss` batched with `vmap`.

        Families override it where they can do the same with fewer operations; the numbers agree up to rounding.
        """
        return vmap(self.loss)(params, batch)

    def losses_and_grads(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Losses `[T]` and gradients `[T, ...]` of T tasks, as constants, for a rule to see; here autograd's.

        Families override it whose base learners see no derivative, such as policies that learn from rollouts. They are
        for first order then, and for no transform.

        Args:
            params, batch: as in `losses`.
        """
        # Evolution strategies run without derivatives, but base learners are trained by theirs all the same.
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            losses = self.losses(leaves, batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return losses.detach(), dict(zip(leaves, grads, strict=True))

    @property
    def black_box(self) -> bool:
        """Whether gradients are not derivatives of `losses`, but estimates of the family's own."""
        return type(self).losses_and_grads is not TaskFamily.losses_and_grads

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        """The whole split for `count` tasks, `[count, ...]`, on which final losses are measured without noise.

        Returns:
            What `loss` reads, expanded where tasks share it; None, the default, where a batch is already exact.
        """
        return None

    def deliver(self, tasks: Task, grads: Tensor, steps: Tensor) -> tuple[Task, Tensor]:
        """What a rule sees of the gradients of T tasks, in place of them: here the gradients themselves.

        Args:
            tasks: tensors `[T, ...]`, which may hold memory that goes on from step to step.
            grads: `[T, P]`, of the train split, right for the parameters before step `steps`, int64 `[T]`.
        Returns:
            The tasks with their memory after this step, and gradients `[T, P]`.
        """
        return tasks, grads

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Scalars of one task on one batch that reports show beside the loss, such as accuracy; none by default.

        Args:
            params, batch: as in `loss`.
        """
        return {}

    @cached_property
    def spec(self) -> ParamSpec:
        """Names and shapes of one task's parameters, and their order in the flat vectors `[T, P]` of the inner loop.

        Found by drawing one task; all tasks of a family have the same.
        """
        generator = make_generator(0)
        return ParamSpec.of(self.init(self.sample(generator), generator))

    @property
    def baseline(self) -> TunedAdam | None:
        """What tuned Adam reaches on these tasks, by which losses of different families become comparable.

        None if it has not been measured with these options (`horizon` apart); `python -m bench levels` measures it.
        """
        return find_measured(self.name, self.config)

    @property
    def nearest_baseline(self) -> TunedAdam | None:
        """What tuned Adam reaches on the family with its default options, whatever the options of this one.

        None if the family is not in the archive; `python -m bench levels` measures it.
        """
        return find_default(self.name)

    def describe(self) -> str:
        """The family's name and options in one line, for logs and as a key of what was measured on it.

        Such as `quadratic(dim=10, distribution='gaussian', init_std=0.01, horizon=100)`.
        """
        options = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"{self.name}({options})"


class ExactTask(TaskFamily):
    """Base of families whose loss needs no mini-batches: the task is its own batch, in every step and split.

    Subclasses write `init`, `loss`, which reads what `sample` drew as its `batch`, and `sample` unless all tasks have
    the same loss and differ only in where they start.
    """

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        choose("split", split, SPLITS)
        return tasks


def branch_seeds(seeds: Tensor, branch: int) -> Tensor:
    """Seeds for a further kind of draws from a batch's seeds, such as noise, independent of all others.

    Args:
        seeds: int64 `[...]`.
        branch: from 0, names the kind within a family.
    Returns:
        int64 of the same shape.
    """
    return fold_in(seeds, torch.tensor(BRANCHES + branch, dtype=torch.int64))
