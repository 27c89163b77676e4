"""MLflow: a run of an experiment, on a tracking server or in local files.

It has no histograms: how values are spread is shown by curves of their percentiles.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
from torch import Tensor

from lopt.core.nested import flatten_dict
from lopt.meta.loggers.base import LoggedRun, Logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAG = "lopt.run"
MAX_VALUE = 500  # characters of a parameter's value, for servers of all versions
BATCH = 100  # parameters in a request
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


class MLflow(Logger):
    """Curves, percentiles, settings, pictures and texts for MLflow.

    Args:
        experiment: to which the run belongs; made where there is none.
        uri: of the tracking server or folder; MLFLOW_TRACKING_URI, or the client's own, by default.
    """

    client = "mlflow"

    def __init__(self, experiment: str = "lopt", uri: str = "") -> None:
        self.experiment, self.uri = experiment, uri

    def begin(self, run: LoggedRun) -> None:
        self.mlflow = self.import_client()
        # No active run of the process: the caller may have one.
        self.tracking = self.mlflow.MlflowClient(tracking_uri=self.uri or None)
        found = self.tracking.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.tracking.create_experiment(self.experiment)
        known = self.tracking.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        if known:
            self.id = known[0].info.run_id
            self.tracking.update_run(self.id, status="RUNNING")
            return
        self.id = self.tracking.create_run(experiment, tags={TAG: run.id}, run_name=run.name).info.run_id
        flat = [
            self.mlflow.entities.Param(key, str(value)[:MAX_VALUE]) for key, value in flatten_dict(run.config).items()
        ]
        for i in range(0, len(flat), BATCH):
            self.tracking.log_batch(self.id, params=flat[i : i + BATCH])

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self.mlflow.entities.Metric
        self.tracking.log_batch(
            self.id, metrics=[metric(f"{kind}/{key}", value, now, step) for key, value in values.items()]
        )

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        # numpy's, as torch.quantile takes 16 million values at most.
        found = numpy.percentile(values.numpy(), PERCENTILES)
        self.scalars(name, step, {f"p{q:03}": float(value) for q, value in zip(PERCENTILES, found, strict=True)})

    def figure(self, name: str, step: int, figure: Figure) -> None:
        self.tracking.log_figure(self.id, figure, f"{name}-{step:06}.png")

    def text(self, name: str, step: int, text: str) -> None:
        self.tracking.log_text(self.id, text, f"{name}.md")

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self.scalars("result", 0, values)

    def close(self, failed: bool) -> None:
        self.tracking.set_terminated(self.id, "FAILED" if failed else "FINISHED")
