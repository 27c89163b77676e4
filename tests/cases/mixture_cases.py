"""A run with two sources, of different families, estimators and horizons."""

from __future__ import annotations

from typing import Any

from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig

MIXTURE: dict[str, Any] = {
    "name": "mixture",
    "rule": {"name": "linear"},
    "estimator": {"name": "truncated", "num_steps": 3},
    "horizon": {"name": "constant", "steps": 5},
    "source": [
        {"name": "bowls", "task": {"name": "quadratic", "dim": 3}, "tasks": 3},
        {
            "task": {"name": "rosenbrock", "dim": 4},
            "estimator": {"name": "pes", "num_steps": 2},
            "horizon": {"name": "log_uniform", "low": 3, "high": 6},
            "tasks": 2,
            "weight": 3,
        },
    ],
    "trainer": {
        "steps": 6,
        "warmup": 1,
        "validate_every": 2,
        "validation_tasks": 3,
        "validation_steps": 4,
        "checkpoint_every": 2,
        "threads": 1,
    },
    "evaluation": {"seeds": 2, "steps": [4]},
}


def make_config(**changes: Any) -> RunConfig:
    return parse_config(MIXTURE | changes)


def make_drawn(task: dict[str, Any], seed: int = 0, **source: Any) -> RunConfig:
    return make_config(source=[{"task": task, "tasks": 8, **source}], trainer={"seed": seed})
