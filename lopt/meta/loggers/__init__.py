"""Loggers: where a run's curves, histograms, pictures and settings go while it is trained.

`LOGGERS` is the registry of those that a configuration can name; `metrics.jsonl`, which every run writes, is beside it.
A new logger is one file, which fills in `Logger`, and one line here.
"""

from __future__ import annotations

from lopt.meta.loggers.base import LoggedRun, Logger
from lopt.meta.loggers.mlflow import MLflow
from lopt.meta.loggers.tensorboard import TensorBoard
from lopt.meta.loggers.trackio import Trackio
from lopt.meta.loggers.wandb import WandB

LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}

__all__ = ["LOGGERS", "LoggedRun", "Logger"]
