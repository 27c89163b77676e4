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
        start: outer step to go on from; anything logged beyond it is dropped.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        if self.path.exists():
            # A run that starts at 0 logs step 0 again.
            kept = [line for line in read_metrics(self.path) if 0 < start >= line["step"]]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of one kind ("train" or "validation") at an outer step."""
        line: dict[str, Any] = {"kind": kind, "step": step}
        for key, value in values.items():
            line[key] = value if math.isfinite(value) else None
            self.board.add_scalar(f"{kind}/{key}", value, step)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def figure(self, name: str, step: int, figure: Figure) -> None:
        """Log a matplotlib figure."""
        self.board.add_figure(name, figure, step)

    def hparams(self, config: Mapping[str, Any], result: Mapping[str, float]) -> None:
        """Log the configuration beside the run's result, for TensorBoard's HParams page."""
        flat = {key: _plain(value) for key, value in flatten_dict(config).items()}
        metrics = {f"result/{key}": value for key, value in result.items()}
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
    *whole, rest = path.read_text(errors="replace").split("\n")
    for number, text in enumerate([*whole, rest], 1):
        try:
            line = json.loads(text)
        except ValueError:
            if number > len(whole):  # empty, or cut off
                break
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path} is damaged: line {number} is no JSON object with a step; mend or remove it")
        lines.append(line)
    return lines


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Where nested dicts differ, such as "a.b 1 -> 2", sorted; the dotted keys in `but` may."""
    before, after = flatten_dict(old), flatten_dict(new)
    keys = sorted(key for key in {*before, *after}.difference(but) if before.get(key) != after.get(key))
    return [f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
