"""Judging rules: the same held-out tasks for a learned rule and for baselines with tuned learning rates."""

from __future__ import annotations

from lopt.evaluate.baselines import BASELINES, CRITERIA, Grid, Tuned, Tuning, tune_baseline
from lopt.evaluate.comparison import compare
from lopt.evaluate.curves import Curves, run_curves
from lopt.evaluate.results import (
    Comparison,
    Contest,
    Entry,
    Run,
    load_comparisons,
    save_comparisons,
)
from lopt.evaluate.statistics import Ratio, Summary

__all__ = [
    "BASELINES",
    "CRITERIA",
    "Comparison",
    "Contest",
    "Curves",
    "Entry",
    "Grid",
    "Ratio",
    "Run",
    "Summary",
    "Tuned",
    "Tuning",
    "compare",
    "load_comparisons",
    "run_curves",
    "save_comparisons",
    "tune_baseline",
]
