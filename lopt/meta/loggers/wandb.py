"""Weights & Biases: a run of a project, on its servers or one's own, or offline for a later `wandb sync`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lopt.meta.loggers.base import LoggedRun, Logger, draw_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEP = "outer_step"


class WandB(Logger):
    """Curves, histograms, pictures and settings for Weights & Biases.

    Who one is and where the server stands is the client's affair: `wandb login`, WANDB_MODE, WANDB_BASE_URL.

    Args:
        project: to which the run belongs.
        entity: user or team; the client's own by default.
        group: by which runs are shown together, such as those of a sweep.
    """

    client = "wandb"

    def __init__(self, project: str = "lopt", entity: str = "", group: str = "") -> None:
        self.project, self.entity, self.group = project, entity, group

    def begin(self, run: LoggedRun) -> None:
        self.wandb = self.import_client()
        self.run = self.wandb.init(
            project=self.project,
            entity=self.entity or None,
            group=self.group or None,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            reinit="create_new",  # a run that the caller has open stays so
            settings=self.wandb.Settings(console="off", silent=True),
        )
        # The client's own counter never goes back, which a resume does.
        self.run.define_metric("*", step_metric=STEP)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({STEP: step} | {f"{kind}/{key}": value for key, value in values.items()})

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        self.run.log({STEP: step, name: self.wandb.Histogram(values.numpy())})

    def figure(self, name: str, step: int, figure: Figure) -> None:
        self.run.log({STEP: step, name: self.wandb.Image(draw_pixels(figure))})

    def text(self, name: str, step: int, text: str) -> None:
        self.run.summary[name] = text

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self.run.summary.update({f"result/{key}": value for key, value in values.items()})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
