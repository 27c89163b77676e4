"""What a logger is: a few calls that a run makes, of which an implementation answers those that it can show."""

from __future__ import annotations

import importlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.core.files import write_atomic
from lopt.core.installation import advise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ID = "log-id"
"""File of a run's folder that holds what trackers know the run by."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger hears of.

    Attributes:
        folder: of the run, which exists.
        name: for people.
        id: 8 hexadecimal digits, the same after a resume and of no other run.
        config: the configuration, nested; {} where a trainer was built without one.
        start: outer step to go on from, -1 for a run that begins. Steps after it may have been logged before: the run
            comes to them again, with equal values.
    """

    folder: Path
    name: str
    id: str
    config: Mapping[str, Any]
    start: int


class Logger(ABC):
    """Somewhere a run is logged to; several may be in use at once.

    Rank 0 alone calls it, from one thread: `begin`, then whatever there is to log, then `close`. What a logger cannot
    show it leaves out. An exception from any call ends the logger and not the run.

    Attributes:
        client: module of the library that it needs, "" for none.
        extra: of lopt that installs it; by default one of the client's name.
        rewinds: `begin` drops what was logged beyond the run's start, so that it has to be logged again; what others
            were told once they are not told again.
    """

    client, extra = "", ""
    rewinds = False

    def check(self) -> None:
        """Refuse a run that could not be logged, before anything of it is made.

        Raises:
            ImportError: the client is not installed; the message names the extra that installs it.
        """
        if self.client:
            self.import_client()

    def import_client(self) -> Any:
        """The client's module.

        Raises:
            ImportError: it is not installed; the message names the extra that installs it.
        """
        try:
            return importlib.import_module(self.client)
        except ImportError as error:
            name, advice = self.client, advise(self.extra or self.client)
            raise ImportError(f"the logger {name!r} needs {name}: {advice}, or leave it out of loggers") from error

    @abstractmethod
    def begin(self, run: LoggedRun) -> None:
        """Begin to log a run, or go on with it."""

    @abstractmethod
    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one kind at an outer step.

        Args:
            kind: such as "train", "validation" or "source NAME".
            step: never falls within a kind and name, but may be earlier than that of the call before.
            values: by name, NaN and infinite ones among them.
        """

    def histogram(self, name: str, step: int, values: Tensor) -> None:  # noqa: B027
        """Log how values are spread.

        Args:
            values: `[N]`, N > 0, float32 on the CPU, all finite.
        """

    def figure(self, name: str, step: int, figure: Figure) -> None:  # noqa: B027
        """Log a matplotlib figure; `name` is the same at every step."""

    def text(self, name: str, step: int, text: str) -> None:  # noqa: B027
        """Log a text, such as the configuration, in Markdown."""

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:  # noqa: B027
        """Log what a run has come to beside its configuration, so that runs can be compared."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Write what is left, and end.

        Args:
            failed: an error or a signal has ended the run, which may be gone on with.
        """


def draw_pixels(figure: Figure) -> Any:
    """A matplotlib figure as an image, for clients that would go through its global state: uint8 `[H, W, 4]`."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.array(canvas.buffer_rgba())


def identify(folder: Path) -> str:
    """What trackers know the run in `folder` by; made when the run begins, and kept there.

    Raises:
        OSError: it cannot be read or written.
    """
    path = folder / ID
    if not path.exists():
        # Not of the run's own random numbers: two runs of one configuration are two runs.
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8", errors="replace").strip()
