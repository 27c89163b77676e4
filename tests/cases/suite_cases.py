"""Two tasks of some steps, and made-up runs, for tests of suites."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lopt.evaluation.suites import SUITES, perceptrons
from lopt.evaluation.suites.runs import Run

TINY = replace(perceptrons.TINY_BATCHES, name="tiny", num_steps=10)
SHORT = replace(perceptrons.DEEP_MLP, name="short", num_steps=12, build=lambda: nn.Linear(16, 2))
TASKS = [task for suite in SUITES.values() for task in suite]


def make_run(
    label: str = "adam", lr: float = 0.01, seed: int = 0, train: float | None = 1.0, schedule: str = "constant"
) -> Run:
    return Run(label, schedule, lr, seed, train, train, None, train is None, 1.0, 1.0, [4.0, 2.0, train])
