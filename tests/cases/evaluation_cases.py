"""What the tests of evaluations share: small tasks, and a search that takes a moment."""

from __future__ import annotations

from lopt.evaluation.baselines import Grid, Tuning
from lopt.tasks import TASKS

QUADRATIC = TASKS["quadratic"](dim=3)
MLP = TASKS["mlp"](width=3, batch_size=16)
SMALL = Tuning(Grid(low=-10, high=0), num_seeds=8, schedules=("constant",))
