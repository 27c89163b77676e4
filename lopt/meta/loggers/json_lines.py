"""JSON lines: the record that every run keeps in `metrics.jsonl`, one object a line, for programs and `lopt report`.

After a resume the lines beyond the checkpoint are cut, so that the file is that of an uninterrupted run (but for
wall-clock figures and memory).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt.core.files import write_atomic
from lopt.meta.loggers.base import LoggedRun, Logger

METRICS = "metrics.jsonl"


class JsonLines(Logger):
    """Scalars as lines of `metrics.jsonl`; of the rest, which is for eyes, it keeps nothing.

    Attributes:
        kept: the lines up to the step that the run goes on from.
        cut: those beyond it, which are in the file no more.
    """

    rewinds = True
    kept: list[dict[str, Any]]
    cut: list[dict[str, Any]]

    def begin(self, run: LoggedRun) -> None:
        path = run.folder / METRICS
        lines = read_metrics(path) if path.exists() else []
        self.kept = [line for line in lines if line["step"] <= run.start]
        self.cut = [line for line in lines if line["step"] > run.start]
        if path.exists():  # even if there is nothing but a line that was cut off
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in self.kept).encode())
        self.file = path.open("a")

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        # JSON has no word for what is not finite.
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step} | plain) + "\n")
        # A run that is killed keeps what it has logged.
        self.file.flush()

    def close(self, failed: bool) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a kill is left out.

    Raises:
        ValueError: another line is damaged.
    """
    lines = []
    # A kill may cut a character in two; what cannot be decoded is found as a line that is no JSON.
    *whole, rest = path.read_text(errors="replace").split("\n")
    for number, text in enumerate([*whole, rest], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number > len(whole):  # empty, or cut off
                break
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path} is damaged: line {number} is no JSON object with a step; mend or remove it")
        lines.append(line)
    return lines
