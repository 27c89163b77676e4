"""All that is drawn for slots, by name: tasks, initial parameters, horizons, batches, and who follows a teacher.

A draw is named by the seed, what it is for, and the slot's number, episode and step. So it does not depend on which
slots are drawn for together, on the order, on the process, or on whether the run was interrupted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lopt.core.random import derive_seeds, draw_uniform, make_generator
from lopt.core.tensors import is_traced
from lopt.meta.unroll.slots import Slots
from lopt.tasks import Batch, Task, TaskFamily

Horizon = Callable[[Tensor], Tensor] | int
"""Draws the horizons `[T]` int64 of new tasks from seeds `[T]`, or is that of all."""

Batches = dict[str, Batch]
"""The batches of one step, by split."""

DRAWN_NUMBERS = 2**21
"""Batches of later steps are drawn at once as long as they have fewer numbers, those of the tasks included."""


@dataclass(frozen=True)
class Draws:
    """Where a loop's randomness comes from.

    Attributes:
        family: that tasks, parameters and batches are of.
        seed: of all draws.
        horizon: draws the number of steps of new tasks, or is that of all; None takes the family's own.
        members: every task has this many slots, next to each other: what they share is drawn once.
        pool: that tasks are of, one of `POOLS`.
    """

    family: TaskFamily
    seed: int
    horizon: Horizon | None = None
    members: int = 1
    pool: str = "train"

    def start_tasks(self, ids: Tensor, episode: Tensor) -> Task:
        """New tasks `[T, ...]`, where `ids` is.

        Args:
            ids, episode: of the slots, int64 `[T]`; equal pairs get the same task.
        """
        # On the CPU, so that a run has the same tasks on any device; once for the members of a pair.
        names = _list_names(ids, episode)
        places = {name: i for i, name in enumerate(dict.fromkeys(names))}
        unique = torch.tensor(list(places), dtype=torch.int64)
        task = self.family.sample_all(derive_seeds(self.seed, "task", *unique.unbind(1)), self.pool)
        if len(places) < len(names):
            where = torch.tensor([places[name] for name in names], dtype=torch.int64)
            task = {key: x[where] for key, x in task.items()}
        return {key: x.to(ids.device) for key, x in task.items()}

    def start_params(self, ids: Tensor, episode: Tensor, task: Task) -> Tensor:
        """The flat initial parameters `[T, P]` of new tasks, where `ids` is.

        Args:
            ids, episode: of the slots, int64 `[T]`; equal pairs get the same ones.
            task: of `start_tasks`.
        """
        names = _list_names(ids, episode)
        drawn: dict[tuple[int, int], Tensor] = {}
        for i, name in enumerate(names):
            if name not in drawn:
                generator = make_generator(derive_seeds(self.seed, "init", *name))
                one = {key: x[i].cpu() for key, x in task.items()}
                drawn[name] = self.family.spec.flatten(self.family.init(one, generator))
        return torch.stack([drawn[name] for name in names]).to(ids.device)

    def horizons(self, ids: Tensor, episode: Tensor) -> Tensor:
        """How many steps new tasks have, int64 `[T]`.

        A schedule sees seeds only, and so cannot tell one slot from another, nor know how many there are.

        Args:
            ids, episode: of the slots, int64 `[T]`.
        """
        if self.horizon is None or isinstance(self.horizon, int):
            return torch.full_like(ids, self.family.horizon if self.horizon is None else self.horizon)
        # What is shared is drawn for slot 0.
        owners = torch.zeros_like(ids) if getattr(self.horizon, "shared", False) else ids
        return self.horizon(derive_seeds(self.seed, "horizon", owners, episode))

    def stagger(self, slots: Slots) -> Slots:
        """The slots with horizons cut at random, so that from then on they end at different times.

        Only the first horizon of a slot is cut; the lengths of later tasks are as they were drawn.
        """
        share = draw_uniform(derive_seeds(self.seed, "stagger", slots.ids), 1)[:, 0]
        return slots._replace(horizon=(share * slots.horizon).long() + 1)

    def follows(self, slots: Slots, share: float) -> Tensor:
        """Which tasks take a teacher's steps, bool `[T, 1]`; a task does or does not from its start to its end.

        Args:
            share: of the tasks, as a probability. If it falls, tasks leave the teacher, and none joins.
        """
        return draw_uniform(derive_seeds(self.seed, "follow", slots.ids, slots.episode), 1) < share

    def hides_end(self, slots: Slots, share: float) -> Tensor:
        """From which tasks' rule their number of steps is hidden, bool `[T]`, from a task's start to its end.

        Args:
            share: of the tasks, as a probability.
        """
        stream = "hide end"
        if slots.ids.device.type != "cpu" or is_traced():
            return _draw_places(self.seed, stream, slots.ids, slots.episode) < share
        # It is asked for at every step, and does not change until slots start new tasks.
        return _recall_places(self.seed, stream, tuple(slots.ids.tolist()), tuple(slots.episode.tolist())) < share

    def batches(self, slots: Slots, splits: Iterable[str], first: int, count: int) -> list[Batches]:
        """The batches of `count` steps, the first of them `first` steps from now.

        The family is asked once for all of these steps and for one member of each task.

        Args:
            splits: of the family's data; each step gets a batch `[T, ...]` of every one.
        """
        owners = slice(None, None, self.members)
        size = len(slots.ids[owners])
        steps = slots.step[owners] + torch.arange(first, first + count, device=slots.ids.device)[:, None]
        seeds = derive_seeds(self.seed, "batch", slots.ids[owners], slots.episode[owners], steps).flatten()
        # Several steps are as many tasks to the family, each as it is at its step: one call draws for all of them.
        task = {key: x[owners] for key, x in slots.task.items()}
        drifted = [self.family.drift(task, step) for step in steps]
        task = drifted[0] if count == 1 else {key: torch.cat([x[key] for x in drifted]) for key in drifted[0]}
        drawn = {split: self.family.batch(task, seeds, split) for split in dict.fromkeys(splits)}

        def pick(x: Tensor, i: int) -> Tensor:
            values = x if count == 1 else x[i * size : (i + 1) * size]
            return values if self.members == 1 else values.repeat_interleave(self.members, 0)

        return [
            {split: {key: pick(x, i) for key, x in tree.items()} for split, tree in drawn.items()} for i in range(count)
        ]

    def batches_ahead(self, slots: Slots, splits: Iterable[str], count: int) -> list[Batches]:
        """The batches of the slots' next steps: of `count` of them, or of as many as are well drawn at once.

        Args:
            splits: of the family's data; each step gets a batch of every one.
        Returns:
            One entry a step, from the next one on: at least one, at most `count`.
        """
        drawn = self.batches(slots, splits, 1, 1)
        if count == 1:
            return drawn
        # The first batch tells how large others are; what only says how a task drifts is not copied for each step.
        task = self.family.drift(slots.task, slots.step)
        size = sum(x.numel() for tree in (task, *drawn[0].values()) for x in tree.values())
        more = min(count, DRAWN_NUMBERS // max(1, size)) - 1
        return drawn + self.batches(slots, splits, 2, more) if more > 0 else drawn


def _list_names(ids: Tensor, episode: Tensor) -> list[tuple[int, int]]:
    """By which slot and episode a task is drawn, for each of the slots."""
    return list(zip(ids.cpu().tolist(), episode.cpu().tolist(), strict=True))


def _draw_places(seed: int, stream: str, ids: Tensor, episode: Tensor) -> Tensor:
    """A number in [0, 1) for each slot's task, `[T]`."""
    return draw_uniform(derive_seeds(seed, stream, ids, episode), 1)[:, 0]


@lru_cache(maxsize=64)
def _recall_places(seed: int, stream: str, ids: tuple[int, ...], episode: tuple[int, ...]) -> Tensor:
    """The same on the CPU, drawn once."""
    return _draw_places(seed, stream, *(torch.tensor(x, dtype=torch.int64) for x in (ids, episode)))
