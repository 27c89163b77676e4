"""What a run says while it goes on: to its own `metrics.jsonl`, and to the loggers that its configuration names.

The JSON lines have every number and are what `lopt report` and a resume read; loggers, which are for eyes, hear nothing
of numbers that stay the same through the whole run.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.meta.loggers.base import LoggedRun, Logger, identify
from lopt.meta.loggers.json_lines import JsonLines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunLog:
    """Writes what there is to say of a run, under its folder and elsewhere.

    Args:
        folder: the run's folder, which exists.
        start: outer step to go on from, -1 for a run that begins; anything logged beyond it is dropped.
        loggers: that have not begun; one that fails is told of in a warning and left out, and the run goes on.
        card: the run's training card, for its name and configuration.
    Raises:
        ImportError: a logger's client is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, start: int = -1, loggers: Sequence[Logger] = (), card: Mapping[str, Any] | None = None
    ) -> None:
        card = card or {}
        self.config = card.get("config") or {}
        run = LoggedRun(folder, card.get("name", folder.name), identify(folder), self.config, start)
        self.lines, self.loggers = JsonLines(), list(loggers)
        for logger in self.loggers:
            logger.check()
        self.lines.begin(run)
        # What a resumed run has logged before is what makes a number one that changes.
        self.changing, self.step = Changing(), max(start, 0)
        self.repeated = {(line.get("kind"), line["step"]) for line in self.lines.cut}
        for line in self.lines.kept:
            for key, value in line.items():
                if key not in ("kind", "step"):
                    self.changing.hear((line["kind"], key), line["step"], math.nan if value is None else value)
        self._tell(lambda logger: logger.begin(run))
        if self.config:
            self.text("preset", f"```json\n{json.dumps(self.config, indent=2)}\n```")

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one kind at an outer step: a line of `metrics.jsonl`, and points of the loggers' curves.

        Args:
            kind: such as "train", "validation" or "source NAME".
            values: by name; those that are not finite are null in the line.
        """
        self.step = step
        self.lines.scalars(kind, step, values)
        if not self.loggers:
            return
        points: dict[int, dict[str, float]] = {}
        for key, value in values.items():
            for when, point in self.changing.hear((kind, key), step, value):
                points.setdefault(when, {})[key] = point
        for when in sorted(points):
            self._tell(
                lambda logger, when=when: logger.scalars(kind, when, points[when]),  # type: ignore[misc]
                (kind, step),
            )

    def weights(self, step: int, weights: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
        """Log the norm of each meta-weight and of its last update, and for loggers how their values are spread.

        Args:
            weights, updates: by name, on any device; no updates before the first step.
        """
        for kind, tensors in (("weight", weights), ("update", updates)):
            if tensors:
                self.scalars(f"{kind}_norm", step, {name: float(x.detach().norm()) for name, x in tensors.items()})
            for name, tensor in tensors.items() if self.loggers else ():
                values = tensor.detach().flatten().float().cpu()
                finite = values[values.isfinite()]
                if len(finite):
                    self._tell(
                        lambda logger, n=f"{kind}/{name}", x=finite: logger.histogram(n, step, x),  # type: ignore[misc]
                        (f"{kind}_norm", step),
                    )

    def figure(self, kind: str, name: str, step: int, draw: Callable[[], Figure]) -> None:
        """Log a matplotlib figure for eyes; it is drawn only where there are any.

        Args:
            kind: of the numbers that it belongs to, which are logged before it.
            name: of the figure, the same at every step.
        """
        if self.loggers:
            figure = draw()
            self._tell(lambda logger: logger.figure(f"{kind}/{name}", step, figure), (kind, step))

    def text(self, name: str, text: str) -> None:
        """Log a text for eyes, in Markdown."""
        self._tell(lambda logger: logger.text(name, self.step, text))

    def result(self, result: Mapping[str, float]) -> None:
        """Log the run's result beside its configuration, so that runs can be compared, and what never changed.

        Args:
            result: numbers by name.
        """
        constants = sorted(f"| {kind}/{key} | {value:g} |" for (kind, key), value in self.changing.constants.items())
        if constants:
            self.text("constants", "\n".join(["| the same in all steps | |", "|---|---|", *constants]))
        self._tell(lambda logger: logger.result(self.config, result))

    def _tell(self, call: Callable[[Logger], None], about: tuple[str, int] | None = None) -> None:
        """Have each logger do something; one that cannot is left out from then on.

        Args:
            about: kind and step. Those that a run comes to again after a resume were told of before: until then points
                were held back as they are now, so that the same ones were shown.
        """
        for logger in list(self.loggers):
            if about in self.repeated and not logger.rewinds:
                continue
            try:
                call(logger)
            except Exception as error:
                self.loggers.remove(logger)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                warnings.warn(
                    f"logger {type(logger).__name__} failed at step {self.step} and is left out: {reason}", stacklevel=3
                )
                with suppress(Exception):
                    logger.close(True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and close all; an error that ends the run is told, not what a full disk then makes of the logs."""
        self._tell(lambda logger: logger.close(kind is not None))
        with suppress(OSError) if kind is not None else nullcontext():
            self.lines.close(kind is not None)


class Changing:
    """Finds the numbers that change: points of the others are held back, so that nobody looks at curves that are flat.

    Attributes:
        constants: by key, those that have had one value so far, and more than one point.
    """

    def __init__(self) -> None:
        # The first and the last point, or none once a number has changed.
        self._held: dict[tuple[str, str], list[tuple[int, float]]] = {}

    @property
    def constants(self) -> dict[tuple[str, str], float]:
        return {key: points[0][1] for key, points in self._held.items() if len(points) > 1}

    def hear(self, key: tuple[str, str], step: int, value: float) -> list[tuple[int, float]]:
        """Take a point of a number; returns the points to show now: with the first change those held back, too.

        Of those that were equal the first and the last are shown, between which a curve is flat.
        """
        point, held = (step, value), self._held.get(key)
        if held is None:
            self._held[key] = [point]
            return []
        if not held:
            return [point]
        # Lines that are read again do not tell NaN from infinity.
        if value == held[0][1] or not (math.isfinite(value) or math.isfinite(held[0][1])):
            self._held[key] = [held[0], point]
            return []
        self._held[key] = []
        return [*held, point]
