"""What an outer step learns from: a family of tasks, an estimator of the meta-gradient on them, and tasks in progress.

The slots of all sources have global numbers: distinct over sources, and shared out over ranks. A slot's draws are named
by its number, so a run is the same whatever process has the slot; the carries are gathered when a checkpoint is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopt.core.random import derive_seeds, make_generator
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import Estimate, Estimator
from lopt.meta.trainer.merging import Total
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.unroll.horizons import HorizonSchedule
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import Rule
from lopt.tasks import TaskFamily


class Source:
    """Tasks in progress on this rank, and the estimator that they feed.

    Args:
        family: tasks to train on.
        estimator: where the meta-gradient comes from.
        tasks: slots, over all ranks.
        name: what logs call it.
        weight: of its meta-gradient, relative to other sources'.
        horizon: schedule of the tasks' lengths; the family's own length by default.
        validation_family: tasks that it is validated on; `family` by default.
        guidance: the factor on a teacher's influence in an outer step; 1 by default.
    """

    def __init__(
        self,
        family: TaskFamily,
        estimator: Estimator,
        tasks: int,
        *,
        name: str = "",
        weight: float = 1.0,
        horizon: HorizonSchedule | None = None,
        validation_family: TaskFamily | None = None,
        guidance: Callable[[int], float] | None = None,
    ) -> None:
        self.family, self.estimator, self.tasks, self.weight = family, estimator, tasks, weight
        self.name, self.horizon = name or family.name, horizon
        self.validation_family, self.guidance = validation_family or family, guidance
        self.carry: Any = None
        """None where none of the slots is this rank's."""

    @property
    def stage(self) -> float:
        """The stage of its schedule of lengths; 0 where there are no stages."""
        return float(self.horizon.stage if self.horizon else 0)

    def start(self, rule: Rule, seed: int, first: int, ranks: Ranks, device: torch.device) -> None:
        """Start those of the slots that are this rank's, and move what the source holds to where the rule is.

        Args:
            rule: that is trained.
            seed: of all draws of the run.
            first: number of the source's first slot; the others follow.
            ranks, device: who does the slots, and where.
        """
        self.ranks, self.ids, self.device = ranks, torch.arange(first, first + self.tasks), device
        self.family, self.validation_family = self.family.to(device), self.validation_family.to(device)
        self.estimator = self.estimator.to(device)
        self.loop = InnerLoop(rule, self.family, seed, self.horizon)
        # Numbers of slots are known on all ranks, carries where the slots are.
        own = ranks.share(self.ids).to(device)
        self.carry = self.estimator.start(self.loop, own) if len(own) else None

    def estimate(self, step: int = 0) -> Estimate | None:
        """The meta-gradient of outer step `step`, on the next window of this rank's slots, which go on.

        Returns:
            None where this rank has none of the slots.
        """
        if self.carry is None:
            return None
        # A function of the step, so that there is nothing of it to save.
        loop = replace(self.loop, guidance=self.guidance(step)) if self.guidance else self.loop
        estimate = self.estimator.estimate(loop, self.carry)
        self.carry = estimate.carry
        return estimate

    # -- saving ----------------------------------------------------------------------------------------------------

    def gather_carry(self) -> dict[str, Tensor]:
        """The carry of all slots in order of their numbers, on rank 0 and its CPU; the others get {}.

        The order makes a checkpoint independent of how many ranks there were: a run may go on with another number.

        Returns:
            Tensors by their place in the carry, "0", "1" and so on.
        """
        leaves = [leaf.cpu() for leaf in tree_flatten(self.carry)[0]] if self.carry is not None else []
        parts = self.ranks.gather({str(i): leaf for i, leaf in enumerate(leaves)}, to_all=False)
        shares = [Ranks(rank, self.ranks.size).share(self.ids) for rank in range(self.ranks.size)]
        return join_rows([(own, part) for own, part in zip(shares, parts, strict=False) if len(own)])

    def list_carry(self) -> list[str]:
        """The names of what `gather_carry` returns, known before a checkpoint is read.

        On a rank without slots they come from a carry that is made for the purpose.
        """
        return [str(i) for i in range(len(tree_flatten(self._example())[0]))]

    def restore_carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what `gather_carry` returned, of the same slots under any number of ranks.

        Args:
            tensors: by their place in the carry, on any device.
        """
        if self.carry is None:
            return
        # The structure is that of the carry that was started; the file has the values.
        leaves, spec = tree_flatten(self.carry)
        own = self.ranks.share(self.ids) - self.ids[0]
        restored = [_split_rows(tensors[str(i)], self.tasks)[own].flatten(0, 1) for i in range(len(leaves))]
        self.carry = tree_unflatten([leaf.to(self.device) for leaf in restored], spec)

    def _example(self) -> Any:
        """A carry of the structure of all."""
        return self.carry or self.estimator.start(self.loop, self.ids[:1].to(self.device))


def _split_rows(tensor: Tensor, slots: int) -> Tensor:
    """`[slots * rows, ...]` -> `[slots, rows, ...]`: estimators may keep several rows for each slot."""
    return tensor.reshape(slots, tensor.shape[0] // slots, *tensor.shape[1:])


def join_rows(parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Join what several ranks hold of the same things, in the order of their numbers.

    Args:
        parts: numbers int64 `[n]` and tensors by name with as many rows, or a multiple: some estimators keep several
            slots for a task.
    """
    if not parts:
        return {}
    # Ranks have interleaved numbers: joined by rank, they have to be sorted.
    order = torch.cat([ids for ids, _ in parts]).argsort()
    split = [{name: _split_rows(value, len(ids)) for name, value in tensors.items()} for ids, tensors in parts]
    return {name: torch.cat([own[name] for own in split])[order].flatten(0, 1) for name in split[0]}


def choose_sources(count: int, wanted: int, seed: int, step: int) -> set[int]:
    """Numbers of the sources that an outer step learns from: a function of seed and step, equal on all ranks.

    Args:
        count: of all sources.
        wanted: of those that are chosen; 0 is all.
    """
    if not 0 < wanted < count:
        return set(range(count))
    order = torch.randperm(count, generator=make_generator(derive_seeds(seed, "sources", step)))
    return set(order[:wanted].tolist())


def list_families(sources: Sequence[Source]) -> dict[str, TaskFamily]:
    """What is validated on: every family once, by the name of its first source.

    Families are told apart as objects: two that were built alike are two.
    """
    families: dict[str, TaskFamily] = {}
    for source in sources:
        if all(source.validation_family is not known for known in families.values()):
            families[source.name] = source.validation_family
    return families


def list_sources(
    tasks: TaskFamily | Sequence[Source],
    estimator: Estimator | None,
    config: TrainerConfig,
    horizon: HorizonSchedule | None,
    validation_family: TaskFamily | None,
) -> list[Source]:
    """What a trainer was given, as sources: those themselves, or the one that a family of tasks is.

    Raises:
        ValueError: a family comes without an estimator, or sources with what they have of their own.
    """
    if isinstance(tasks, TaskFamily):
        if estimator is None:
            raise ValueError("Trainer: a family of tasks needs an estimator, got None")
        return [Source(tasks, estimator, config.tasks, horizon=horizon, validation_family=validation_family)]
    if any(given is not None for given in (estimator, horizon, validation_family)):
        raise ValueError("Trainer: sources have estimators, horizons and validation families of their own: give none")
    return list(tasks)


def describe_sources(sources: Sequence[Source], totals: Sequence[Total]) -> dict[str, dict[str, float]]:
    """What to log of each source by itself, so that one that goes wrong can be told from the others; {} of one.

    Args:
        totals: of the sources, in their order; those that this step did not learn from have no metrics.
    """
    if len(sources) == 1:
        return {}
    return {
        source.name: total.metrics | {"gradient_norm": float(total.gradient.norm()), "horizon_stage": source.stage}
        for source, total in zip(sources, totals, strict=True)
        if total.metrics
    }
