"""trackio: a tracker that keeps runs on this machine, shows them by `trackio show`, and can send them to a Space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.meta.loggers.base import LoggedRun, Logger, draw_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Trackio(Logger):
    """Curves, histograms, pictures and settings for trackio; files are where TRACKIO_DIR says.

    Args:
        project: to which the run belongs.
        group: by which runs are shown together, such as those of a sweep.
        space: of Hugging Face, such as "owner/name", to send them to; none by default.
    """

    client = "trackio"

    def __init__(self, project: str = "lopt", group: str = "", space: str = "") -> None:
        self.project, self.group, self.space = project, group, space

    def begin(self, run: LoggedRun) -> None:
        self.trackio = self.import_client()
        self.run = self.trackio.init(
            project=self.project,
            name=f"{run.name}-{run.id}",  # it knows runs by their names
            group=self.group or None,
            space_id=self.space or None,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        self.run.log({name: self.trackio.Histogram(values.numpy())}, step=step)

    def figure(self, name: str, step: int, figure: Figure) -> None:
        self.run.log({name: self.trackio.Image(draw_pixels(figure))}, step=step)

    def text(self, name: str, step: int, text: str) -> None:
        self.run.log({name: self.trackio.Markdown(text)}, step=step)

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self.run.log({f"result/{key}": value for key, value in values.items()})

    def close(self, failed: bool) -> None:
        self.run.finish()
