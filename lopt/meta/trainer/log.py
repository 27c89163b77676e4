"""What a run says while it goes on: JSON lines for programs, TensorBoard for eyes.

`metrics.jsonl` has one object a line; after a resume the lines beyond the checkpoint are cut, so that the file is that
of an uninterrupted run (but for wall-clock figures).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


METRICS = "metrics.jsonl"


class RunLog:
    """Writes a run's metrics under its folder.

    Args:
        folder: the run's folder, which exists.
        start: outer step to go on from, -1 for a run that begins; anything logged beyond it is dropped.
    """

    def __init__(self, folder: Path, start: int = -1) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= start]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one kind at an outer step: a line of `metrics.jsonl`, and points of TensorBoard's curves.

        Args:
            kind: such as "train", "validation" or "source NAME".
            values: by name; those that are not finite are null in the line, since JSON has no word for them.
        """
        line: dict[str, Any] = {"kind": kind, "step": step}
        for key, value in values.items():
            line[key] = value if math.isfinite(value) else None
            self.board.add_scalar(f"{kind}/{key}", value, step)
        self.file.write(json.dumps(line) + "\n")
        # A run that is killed keeps what it has logged.
        self.file.flush()

    def figure(self, name: str, step: int, figure: Figure) -> None:
        """Log a matplotlib figure for TensorBoard, where a slider goes through its steps; the JSON lines have none.

        Args:
            name: of the figure, the same at every step.
        """
        self.board.add_figure(name, figure, step)

    def hparams(self, config: Mapping[str, Any], result: Mapping[str, float]) -> None:
        """Log the configuration beside the run's result, so that TensorBoard's HParams page compares runs.

        Args:
            config: nested; entries that are no plain values are written as JSON.
            result: numbers by name.
        """
        flat = {key: _plain(value) for key, value in flatten_dict(config).items()}
        metrics = {f"result/{key}": value for key, value in result.items()}
        # In the run's own folder: by default it would be one more run, named by the time.
        self.board.add_hparams(flat, metrics, run_name=".")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and close both; an error that ends the run is told, not what a full disk then makes of the logs."""
        with ExitStack() as closing:  # the second one also where the first fails
            if kind is not None:
                closing.enter_context(suppress(OSError))
            for file in (self.board, self.file):
                closing.callback(file.close)


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


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys, the form in which people name settings.

    Args:
        tree: with keys that are strings; lists are values.
        prefix: of all keys, with its dot.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Where two configurations differ, for messages and tables: such as "a.b 1 -> 2", sorted.

    Args:
        old, new: nested dicts; an entry that one of them lacks counts as None.
        but: dotted keys that may differ.
    """
    before, after = flatten_dict(old), flatten_dict(new)
    keys = sorted(key for key in {*before, *after}.difference(but) if before.get(key) != after.get(key))
    return [f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
