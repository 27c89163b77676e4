"""What every estimator does beside its gradient: find tasks that went wrong, start others instead, and count.

A task is healthy as long as its losses, parameters and gradients are finite. One that is not must not touch the
estimate of the others: it is left out of all means, counted as skipped, and its slot starts a new task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window, put_slots, select_slots

METRICS = ("loss", "meta_loss", "objective", "imitation_loss", "skipped_slots", "finished_tasks", "inner_steps")
"""What every estimate tells. The first four are means over healthy tasks, the others are counts."""


@dataclass
class Tally:
    """Sums over the tasks of one estimate, from which its metrics are made; windows are added as they are run.

    Attributes:
        alive: tasks that were healthy, over which the means are.
        loss, meta_loss, objective, imitation_loss: sums over healthy tasks of each one's mean over the window.
        finished_tasks: tasks that came to their end in a window.
        inner_steps: steps that were made, each member of a pair counted.
    """

    alive: int = 0
    loss: float = 0.0
    meta_loss: float = 0.0
    objective: float = 0.0
    imitation_loss: float = 0.0
    finished_tasks: float = 0.0
    inner_steps: float = 0.0

    def add(self, window: Window, objective: Tensor, healthy: Tensor) -> None:
        """Count a window of n tasks, run by one or more members each that are next to each other.

        Args:
            window: of all members of the tasks.
            objective: what the healthy tasks contribute, of any shape: its elements are summed.
            healthy: bool `[n]`; all members of a task count, or none.
        """
        losses, imitation = window.losses.detach(), window.imitation.detach()
        members = losses.shape[1] // len(healthy)
        values = torch.stack([losses, losses / window.first_loss.abs(), imitation])
        loss, meta_loss, imitated = average_members(average_steps(window, values), healthy).sum(-1).tolist()
        self.loss += loss
        self.meta_loss += meta_loss
        self.imitation_loss += imitated
        self.alive += int(healthy.sum())
        self.objective += float(objective.detach().sum())
        # The members of a pair end one task together, but each one's steps have a cost.
        self.finished_tasks += float(window.finished[:, ::members].sum())
        self.inner_steps += float(window.active.sum())

    def summarize(self, count: int) -> dict[str, float]:
        """The metrics of an estimate on `count` tasks, by the names in `METRICS`.

        The means are NaN where no task was healthy: a mean of nothing must not look like a loss of 0.
        """
        scale = 1 / self.alive if self.alive else math.nan
        means = {name: getattr(self, name) * scale for name in METRICS[:4]}
        return means | {
            "skipped_slots": float(count - self.alive),
            "finished_tasks": self.finished_tasks,
            "inner_steps": self.inner_steps,
        }


def average_steps(window: Window, values: Tensor) -> Tensor:
    """Each slot's mean over the steps that it made, `[..., K, T]` -> `[..., T]`; resting slots have made fewer than K.

    Args:
        window: says which steps those are.
        values: of every step; those of steps that were not made do not count.
    """
    return (values * window.active).sum(-2) / window.active.sum(0)


def average_members(values: Tensor, healthy: Tensor) -> Tensor:
    """The mean over each healthy task's members, one number for a task: `[..., n * members]` -> `[..., healthy tasks]`.

    Args:
        values: of all members, those of a task next to each other.
        healthy: bool `[n]`.
    """
    return values.view(*values.shape[:-1], len(healthy), -1)[..., healthy, :].mean(-1)


def find_finite(window: Window) -> Tensor:
    """Which slots stayed finite over a window, bool `[T]`: losses, parameters, gradients and imitation losses.

    The meta-gradient is not looked at: where it is differentiated, it may be infinite for finite losses.
    """
    values = [window.losses.detach().T, window.slots.params, window.slots.grad, window.imitation.detach().T]
    if are_finite(values):  # as nearly always
        return torch.ones_like(window.active[0])
    return torch.stack([v.isfinite().all(-1) for v in values]).all(0)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite, which one sum of all of them says in few operations."""
    return math.isfinite(float(sum(x.sum() for x in tensors))) or all(bool(x.isfinite().all()) for x in tensors)


def renew_sick(loop: InnerLoop, before: Slots, after: Slots, sick: Tensor) -> Slots:
    """The slots after a window, those that are `sick` (bool `[T]`) on a new task each.

    Args:
        before: the same slots at the start of the window. The new task is that of the episode after theirs, whatever
            a sick slot did since, so that a slot's tasks are the same whoever else is sick.
    """
    where = sick.nonzero()[:, 0]
    if not len(where):  # as nearly always
        return after
    old = select_slots(before, where)
    return put_slots(after, where, loop.restart(old.ids, old.episode + 1))
