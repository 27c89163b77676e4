"""Tasks in progress, batched: what an inner loop carries from step to step, and what it leaves behind.

All is in tensors with the slots first, and nothing in Python objects: so slots are selected, joined, saved, and
captured in a graph by the same few functions, whatever rule or task they are of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.rules import State
from lopt.tasks import Task


class Slots(NamedTuple):
    """T tasks in progress; every tensor has T first.

    Attributes:
        ids: global number of the slot, int64; names its random streams.
        episode: tasks that this slot has finished, int64.
        step, horizon: steps made on the present task and steps to make, int64.
        task: what distinguishes the task, from `TaskFamily.sample`, and its memory (see `TaskFamily.deliver`).
        params: flat parameters `[T, P]`.
        state: the rule's memory.
        teacher_state: the teacher rule's memory; empty without imitation.
        loss, grad: at `params` on the batch of `step`: `[T]` and `[T, P]`.
        first_loss: the loss at step 0 `[T]`.
    """

    ids: Tensor
    episode: Tensor
    step: Tensor
    horizon: Tensor
    task: Task
    params: Tensor
    state: State
    teacher_state: State | tuple[()]
    loss: Tensor
    grad: Tensor
    first_loss: Tensor


class Window(NamedTuple):
    """What K steps of T slots leave behind.

    Attributes:
        losses: `[K, T]`, after each step; differentiable in the meta-weights.
        imitation: `[K, T]`, half mean squared difference to the teacher's step (0 without a teacher).
        first_loss: `[K, T]`, the loss at step 0 of the task that the slot was on.
        finished: `[K, T]` bool, the task ended with this step.
        episode: `[K, T]` int64, of the task that the slot was on.
        steps: `[K, T]` int64, that the task had made with this one.
        active: `[K, T]` bool, the slot made a step; the other entries of a window mean nothing.
        slots: where the slots are now, cut from the graph.
    """

    losses: Tensor
    imitation: Tensor
    first_loss: Tensor
    finished: Tensor
    episode: Tensor
    steps: Tensor
    active: Tensor
    slots: Slots


def join_windows(parts: Sequence[Window], slots: Slots) -> Window:
    """Windows of the same slots one after the other in time, as one with the sum of their steps.

    Args:
        parts: at least one; their own slots are not looked at.
        slots: after the last step.
    """
    joined = parts[0][:-1] if len(parts) == 1 else map(torch.cat, zip(*(part[:-1] for part in parts), strict=True))
    return Window._make([*joined, detach_slots(slots)])


def detach_slots(slots: Slots) -> Slots:
    """The slots cut from the autograd graph, on the same memory.

    This is where truncation happens: what goes on to the next window is a constant there.
    """
    return _map(Tensor.detach, slots)


def select_slots(slots: Slots, which: Tensor | slice) -> Slots:
    """Some of the slots, in the order of the indices.

    Args:
        which: int64 indices, for copies, or a slice, for views.
    """
    return _map(lambda x: x[which], slots)


def put_slots(slots: Slots, where: Tensor, fresh: Slots) -> Slots:
    """The slots with others in some places; neither is changed.

    Args:
        where: int64 indices, each once.
        fresh: as many slots as there are indices.
    """
    return _map(lambda old, new: old.index_copy(0, where, new), slots, fresh)


def repeat_slots(slots: Slots, count: int) -> Slots:
    """Every slot `count` times in a row: the members of a pair on the same task.

    They have the same number, so that they draw the same batches.
    """
    return _map(lambda x: x.repeat_interleave(count, 0), slots)


def join_slots(parts: list[Slots]) -> Slots:
    """Slots one after the other, as they were before they were selected for chunks.

    Args:
        parts: at least one, of the same rule and family.
    """
    return parts[0] if len(parts) == 1 else _map(lambda *xs: torch.cat(xs), *parts)


def _map(function: Callable[..., Tensor], *slots: Slots) -> Slots:
    """`function` on every tensor of one or more `Slots`."""
    result: Slots = _map_trees(function, slots)
    return result


def _map_trees(function: Callable[..., Tensor], trees: Sequence[Any]) -> Any:
    """What torch's `tree_map` does, for the kinds of trees that slots are: it takes several times as long."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: _map_trees(function, [tree[key] for tree in trees]) for key in first}
    mapped = [_map_trees(function, parts) for parts in zip(*trees, strict=True)]
    return type(first)._make(mapped) if hasattr(first, "_make") else type(first)(mapped)
