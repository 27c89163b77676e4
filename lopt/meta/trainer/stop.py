"""Reasons to end a run before its last step: a signal, or the end of its time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any


class Reason(IntEnum):
    """Why to end; of several ranks' reasons the largest counts."""

    NONE = 0
    TIME = 1
    SIGNAL = 2


class Stop:
    """What a run looks at after every outer step.

    Args:
        time_limit: seconds from now, or None.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.asked = False

    @property
    def reason(self) -> Reason:
        """Why to end now, if there is a reason."""
        if self.asked:
            return Reason.SIGNAL
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return Reason.TIME if late else Reason.NONE

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks to stop, the second one is as usual; only in the main thread."""
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
