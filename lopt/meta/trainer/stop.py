"""Reasons to end a run before its last step: a signal, the end of its time, or that nothing is learned any more.

A run ends between outer steps only, with a checkpoint, and all ranks at the same step: a rank that is told to stop
asks, and after the step the ranks agree.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

MAX_DEAD_STEPS = 20
"""Outer steps in a row without a gradient after which a run gives up."""


class Reason(IntEnum):
    """Why to end; of several ranks' reasons the largest counts.

    A signal wants the process gone, so it outweighs the end of the time, after which a run is still judged.
    """

    NONE = 0
    TIME = 1
    SIGNAL = 2


class Stop:
    """What a run looks at after every outer step to know whether it is to end.

    Args:
        time_limit: seconds from now, or None for as long as it takes.

    Attributes:
        asked: whether a signal has come.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.asked = False

    @property
    def reason(self) -> Reason:
        """Why to end now; `Reason.NONE` while there is none.

        The clock is a monotonic one: setting the machine's time ends no run.
        """
        if self.asked:
            return Reason.SIGNAL
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return Reason.TIME if late else Reason.NONE

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """While it lasts, the first SIGINT or SIGTERM asks to stop, and the second one does what it did before.

        So a run that takes long to come to the end of its step can still be interrupted. Only in the main thread:
        elsewhere Python allows no handlers, and signals are the caller's affair.
        """
        previous: dict[int, Any] = {}

        def handle(number: int, frame: Any) -> None:
            self.asked = True
            for caught, handler in previous.items():
                signal.signal(caught, handler)

        try:
            for wanted in (signal.SIGINT, signal.SIGTERM):
                previous[wanted] = signal.getsignal(wanted)
                signal.signal(wanted, handle)
        except ValueError:  # not the main thread: signals are the caller's affair
            previous.clear()
        try:
            yield
        finally:
            for caught, handler in previous.items():
                signal.signal(caught, handler)


class DeadSteps:
    """Counts the outer steps in a row that taught nothing, to end a run that would go on for hours for nothing.

    One such step is no reason: a gradient may overflow, or all slots be dropped, and the next window is another one.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, metrics: Mapping[str, float], slots: int) -> int:
        """Look at a step and return how many dead ones there have been in a row, this one included.

        Args:
            metrics: of the step, over all sources and ranks.
            slots: of the run; a step in which all were dropped is dead, as is one with a gradient that is not finite.
        """
        alive = math.isfinite(metrics["gradient_norm"]) and metrics["skipped_slots"] < slots
        self.in_a_row = 0 if alive else self.in_a_row + 1
        return self.in_a_row

    def explain(self, step: int, best_step: int) -> str:
        """The error message of a run that gives up: what happened, what to change, and what there is of it.

        Args:
            step: the last one.
            best_step: after which validation was best.
        """
        return (
            f"in the last {MAX_DEAD_STEPS} outer steps no task gave a finite meta-gradient (step {step}). "
            "Lower trainer.learning_rate, the rule's output scale or the loss's scale; the best weights so far "
            f"are those of step {best_step}"
        )
