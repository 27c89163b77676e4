"""Train a rule: the learning stage, from tasks in progress to a trainer of meta-weights.

A `TaskFamily` gives tasks; `unroll/` runs them in slots, a window of steps at a time, under the rule; `estimators/`
make a meta-gradient of a window's losses; `trainer/` merges the gradients of sources and ranks, steps the meta-weights,
and validates. `config/` builds all of it from a preset. What a program needs for a run of its own is exported here, and
loaded when it is asked for: whoever only unrolls a rule does not load a trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt.meta.config.trainer import TrainerConfig
    from lopt.meta.estimators import ESTIMATORS
    from lopt.meta.trainer.source import Source
    from lopt.meta.trainer.trainer import Trainer
    from lopt.meta.unroll.horizons import HORIZONS

_HOMES = {
    "ESTIMATORS": "lopt.meta.estimators",
    "HORIZONS": "lopt.meta.unroll.horizons",
    "Source": "lopt.meta.trainer.source",
    "Trainer": "lopt.meta.trainer.trainer",
    "TrainerConfig": "lopt.meta.config.trainer",
}

__all__ = ["ESTIMATORS", "HORIZONS", "Source", "Trainer", "TrainerConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
