"""TensorBoard: event files in the run's own folder, which `tensorboard --logdir runs` shows beside those of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.core.nested import flatten_dict
from lopt.meta.loggers.base import LoggedRun, Logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tensorboard"
LARGEST = 9e19
"""Of the values in its histograms; it knows none beyond."""


class TensorBoard(Logger):
    """Curves, histograms and pictures with a slider through their steps, and a page that compares settings."""

    client, extra = "tensorboard", "train"
    rewinds = True

    def begin(self, run: LoggedRun) -> None:
        # A second to import, and not needed by runs that log elsewhere.
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run.folder / FOLDER), purge_step=run.start + 1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        self.board.add_histogram(name, values.clamp(-LARGEST, LARGEST), step)

    def figure(self, name: str, step: int, figure: Figure) -> None:
        self.board.add_figure(name, figure, step)

    def text(self, name: str, step: int, text: str) -> None:
        self.board.add_text(name, text, step)

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        flat = {key: _plain(value) for key, value in flatten_dict(config).items()}
        metrics = {f"result/{key}": value for key, value in values.items()}
        # In the run's own folder: by default it would be one more run, named by the time.
        self.board.add_hparams(flat, metrics, run_name=".")

    def close(self, failed: bool) -> None:
        self.board.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
