"""How backpropagation is to be cut for a budget of memory: chunks of tasks, and updates that are computed twice."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopt.meta.estimators import Estimator
from lopt.meta.estimators.backprop import Backprop
from lopt.meta.trainer.source import Source
from lopt.meta.unroll.inner_loop import InnerLoop

MIN_CHUNK = 4
"""Fewer tasks at a time are mostly small operations: with `mlp` on digits chunks of 4 took twice as long as all 16."""

SHORT = (3, 6)
"""Steps of the windows that are measured."""


class Plan(NamedTuple):
    """Options of an estimator.

    Attributes:
        task_chunk, checkpoint: see `Backprop`.
        bytes: that one chunk's window is expected to take.
        whole: that the window of all tasks would take, nothing computed twice.
    """

    task_chunk: int
    checkpoint: str | None
    bytes: int
    whole: int

    def describe(self, tasks: int) -> str:
        """What is done and why, in one line."""
        means = f"all {tasks} tasks" if self.task_chunk >= tasks else f"{self.task_chunk} of {tasks} tasks"
        twice = ", computing updates twice" if self.checkpoint else ""
        return (
            f"backpropagation takes {means} at a time{twice}: about {self.bytes / 2**20:,.0f} MiB "
            f"({self.whole / 2**20:,.0f} MiB for all at once)"
        )


def plan_memory(loop: InnerLoop, estimator: Estimator, tasks: int, budget: int) -> Plan | None:
    """The options with which a window stays within `budget` bytes; None where nothing is saved.

    Nothing is computed twice unless fewer than `MIN_CHUNK` tasks fit. What a task takes is measured on its first steps.

    Raises:
        ValueError: one task does not fit.
    """
    if not isinstance(estimator, Backprop):
        return None
    slot = tree_leaves(estimator.start(loop, _name_first(loop)))
    held = tasks * sum(x.numel() * x.element_size() for x in slot)  # where all tasks are after the window
    whole = held + tasks * _measure_task(loop, estimator, None)
    found = None
    for checkpoint in (None, "update"):
        size = _measure_task(loop, estimator, checkpoint)
        chunk = max(0, min(tasks, (budget - held) // size))
        if chunk and (found is None or chunk > found.task_chunk):
            found = Plan(chunk, checkpoint, held + chunk * size, whole)
        if chunk >= min(tasks, MIN_CHUNK):
            break
    if found is None:
        raise ValueError(
            f"one task's window of {estimator.num_steps} steps takes {size / 2**20:,.0f} MiB, and the budget is "
            f"{budget / 2**20:,.0f} MiB: raise it, or lower estimator.num_steps or the sizes of task and rule"
        )
    return found


def fit_all(sources: Sequence[Source], mib: int) -> list[str]:
    """`fit_memory` for all sources with a budget of `mib` MiB each (0: no bound); returns what there is to say."""
    return [plan for source in sources if mib and (plan := fit_memory(source, mib * 2**20))]


def fit_memory(source: Source, budget: int) -> str | None:
    """Give a source's estimator the options of the plan for this rank's slots; returns what it comes to.

    Options that were given stay as they are: then there is no plan.

    Raises:
        ValueError: see `plan_memory`.
    """
    estimator = source.estimator
    if source.carry is None or not isinstance(estimator, Backprop):
        return None
    if estimator.task_chunk is not None or estimator.checkpoint is not None:
        return None
    tasks = len(source.carry.ids)
    plan = plan_memory(source.loop, estimator, tasks, budget)
    assert plan is not None
    source.estimator = planned = copy(estimator)
    planned.task_chunk, planned.checkpoint = plan.task_chunk, plan.checkpoint
    return f"{source.name}: {plan.describe(tasks)}"


def _measure_task(loop: InnerLoop, estimator: Backprop, checkpoint: str | None) -> int:
    """Bytes that are alive at most during one task's estimate: those of short windows, which grow with the steps."""
    peaks: list[int] = []
    for steps in SHORT:
        own = copy(estimator)
        own.checkpoint, own.compile, own.num_steps = checkpoint, False, steps
        slots = own.configure(loop).start(_name_first(loop))
        with PeakMemory() as memory:
            own.backpropagate(own.configure(loop), slots, steps, restart=False)
        peaks.append(memory.peak)
    growth: float = (peaks[1] - peaks[0]) / (SHORT[1] - SHORT[0])
    return math.ceil(peaks[0] + max(0, estimator.num_steps - SHORT[0]) * growth)


def _name_first(loop: InnerLoop) -> Tensor:
    """The number of slot 0, `[1]`, where the rule is."""
    return torch.zeros(1, dtype=torch.int64, device=next(loop.rule.parameters()).device)


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside that are alive at the same time, at most: `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and watch its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def forget(_: object) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
