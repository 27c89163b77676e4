"""How backpropagation is to be cut for a budget of memory: chunks of tasks, and updates that are computed twice.

What a task takes is not guessed from sizes but measured: two short windows of one task are differentiated under a
count of what is alive, and a window of any length follows, because its memory grows by the same amount with each step.
"""

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


class MemoryPlan(NamedTuple):
    """How an estimator is to cut its windows, and what that takes.

    Attributes:
        task_chunk, checkpoint: options of `Backprop`: tasks per backward pass, and what is computed twice.
        bytes: that one chunk's window is expected to take.
        whole: that the window of all tasks would take, nothing computed twice.
    """

    task_chunk: int
    checkpoint: str | None
    bytes: int
    whole: int

    def describe(self, tasks: int) -> str:
        """What is done and why, in one line for the user.

        Args:
            tasks: of the source on this rank, of which a chunk is a part.
        """
        means = f"all {tasks} tasks" if self.task_chunk >= tasks else f"{self.task_chunk} of {tasks} tasks"
        twice = f", computing {self.checkpoint}s twice" if self.checkpoint else ""
        return (
            f"backpropagation takes {means} at a time{twice}: about {self.bytes / 2**20:,.0f} MiB "
            f"({self.whole / 2**20:,.0f} MiB for all at once)"
        )


def plan_memory(loop: InnerLoop, estimator: Estimator, tasks: int, budget: int) -> MemoryPlan | None:
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
    best = None
    # Chunks cost little time, updates computed twice much: these only where chunks would be tiny.
    for checkpoint in (None, "update" if estimator.order == 1 else "step"):
        size = _measure_task(loop, estimator, checkpoint)
        chunk = max(0, min(tasks, (budget - held) // size))
        if chunk and (best is None or chunk > best.task_chunk):
            best = MemoryPlan(chunk, checkpoint, held + chunk * size, whole)
        if chunk >= min(tasks, MIN_CHUNK):
            break
    if best is None:
        raise ValueError(
            f"one task's window of {estimator.num_steps} steps takes {size / 2**20:,.0f} MiB, and the budget is "
            f"{budget / 2**20:,.0f} MiB: raise it, or lower estimator.num_steps or the sizes of task and rule"
        )
    return best


def fit_all(sources: Sequence[Source], mib: int) -> list[str]:
    """Fit the windows of all sources to a budget, each by itself, since they are differentiated one after the other.

    Args:
        mib: the budget in MiB; 0 sets no bound.
    Returns:
        A line on each source that has got a plan.
    """
    return [plan for source in sources if mib and (plan := fit_memory(source, mib * 2**20))]


def fit_memory(source: Source, budget: int) -> str | None:
    """Give a source's estimator the options of the plan for this rank's slots; returns what it comes to in a line.

    Options that were given stay as they are: then there is no plan, and None comes back.

    Args:
        budget: in bytes.
    Raises:
        ValueError: one task's window does not fit.
    """
    estimator = source.estimator
    # Evolution strategies keep no activations; and a rank without slots has nothing to fit.
    if source.carry is None or not isinstance(estimator, Backprop):
        return None
    if estimator.task_chunk is not None or estimator.checkpoint is not None:
        return None
    tasks = len(source.carry.ids)
    plan = plan_memory(source.loop, estimator, tasks, budget)
    assert plan is not None
    # A copy: the estimator is the caller's, who may use it elsewhere.
    source.estimator = planned = copy(estimator)
    planned.task_chunk, planned.checkpoint = plan.task_chunk, plan.checkpoint
    return f"{source.name}: {plan.describe(tasks)}"


def _measure_task(loop: InnerLoop, estimator: Backprop, checkpoint: str | None) -> int:
    """Bytes that are alive at most during one task's estimate: those of short windows, which grow with the steps."""
    peaks: list[int] = []
    for steps in SHORT:
        measured = copy(estimator)
        measured.checkpoint, measured.compile, measured.num_steps = checkpoint, False, steps
        # Slot 0, whoever has it: all ranks measure the same task.
        slots = measured.configure(loop).start(_name_first(loop))
        with PeakMemory() as memory:
            measured.backpropagate(measured.configure(loop), slots, steps, restart=False)
        peaks.append(memory.peak)
    # Two points make a line; what the first window has besides its steps is in the shorter one.
    growth: float = (peaks[1] - peaks[0]) / (SHORT[1] - SHORT[0])
    return math.ceil(peaks[0] + max(0, estimator.num_steps - SHORT[0]) * growth)


def _name_first(loop: InnerLoop) -> Tensor:
    """The number of slot 0, `[1]`, where the rule is."""
    return torch.zeros(1, dtype=torch.int64, device=next(loop.rule.parameters()).device)


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside that are alive at the same time: `peak` is the most there were.

    It watches every operation's results, storage by storage, so views count once; it works on any device, and does not
    see what operations take for themselves.
    """

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

        # Storages are known by their identity, which another one may get as soon as they are gone.
        def forget(_: object) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
