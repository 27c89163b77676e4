"""The figures of a suite: runs of a rule and of contenders as ratios to tuned Adam, task by task and over tasks.

Every ratio is to the better of Adam and AdamW, constant and cosine, with its learning rate tuned on that task; the runs
of both have the same seeds. Below 1 is better for losses, above 1 for the speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, inf, log
from statistics import fmean, median
from typing import Any

import torch

from lopt.core.schema import conform
from lopt.evaluation.statistics import average_middle_interval, compute_speedup, keep_finite
from lopt.evaluation.suites.runs import Run

FORMAT = 1
WORSE = 1.25
"""Tasks are counted on which the final loss is above this many times tuned Adam's."""
FLOOR = 1e-6
"""Losses count as this at least: below it nobody cares which is lower."""


@dataclass(frozen=True)
class Standing:
    """How an optimizer did on one task, over the seeds.

    Attributes:
        task: its name.
        setting: "SCHEDULE LR" of contenders; "" of rules.
        train, validation: geometric means; None where a run is not finite.
        accuracy: mean; None where there is none.
        train_ratio, validation_ratio: to tuned Adam, of the geometric means; None where that was not tuned, infinite
            (None in JSON, with `diverged` above 0) where a run is not finite.
        speedup: steps that tuned Adam needs over steps that this needs to the same loss; None as above.
        beats_default: the final loss is below that of AdamW as it comes; None where that was not run.
        diverged: number of runs that did.
        step_ms: CPU time of the optimizer's step.
        extra_ms: that, less that of AdamW on this machine; None for archived runs.
    """

    task: str
    setting: str
    train: float | None
    validation: float | None
    accuracy: float | None
    train_ratio: float | None
    validation_ratio: float | None
    speedup: float | None
    beats_default: bool | None
    diverged: int
    step_ms: float
    extra_ms: float | None


@dataclass(frozen=True)
class Interval:
    """An interquartile mean over tasks with its 95 % interval by the bootstrap over tasks."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One optimizer over a suite.

    Attributes:
        label: for readers.
        kind: "rule", "other" (another rule), "tuned", "one rate" or "default".
        standings: on every task that it ran on.
        train, validation, speedup: interquartile means over the tasks where tuned Adam is known; None without any.
        worse: number of those tasks on which it ends above `WORSE` times tuned Adam's loss.
        better_than_default: share of tasks on which it ends below AdamW as it comes.
        diverged: number of runs that did.
        extra_ms: median over tasks.
        against: the final loss of the rule that is judged over that of this optimizer, paired by task: below 1 the rule
            is better. None where they have no task in common, and for the rule itself.
    """

    label: str
    kind: str
    standings: list[Standing]
    train: Interval | None
    validation: Interval | None
    speedup: Interval | None
    worse: int
    better_than_default: float | None
    diverged: int
    extra_ms: float | None
    against: Interval | None = None


@dataclass(frozen=True)
class SuiteResult:
    """All that is known of a rule on a suite.

    Attributes:
        suite: its name.
        seeds: that every optimizer ran with.
        rows: the rule first.
        untuned: tasks that have no tuned Adam to compare with.
        heldout_runs: how often the rule was judged on the held-out suite, this time included; 0 on others.
        command: that repeats it.
        environment: versions.
        about, source: what the rule is, in a line, and the name or path that it is loaded by; "" where nobody knows.
    """

    suite: str
    seeds: int
    rows: list[Row]
    untuned: list[str]
    heldout_runs: int = 0
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    about: str = ""
    source: str = ""
    format: int = FORMAT

    @property
    def rule(self) -> Row:
        """The one that is judged."""
        return self.rows[0]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the JSON of a result holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> SuiteResult:
        """The inverse of `to_json`, checked.

        Raises:
            ValueError: it is something else, or of another version.
        """
        found: SuiteResult = conform(data, cls, "result")
        if found.format != FORMAT:
            raise ValueError(f"expected a result of format {FORMAT}, found {found.format}; judge again")
        return found


@dataclass(frozen=True)
class Measured:
    """The runs of one optimizer on one task, with what they are held against.

    Attributes:
        task: its name.
        runs: one per seed.
        reference: of tuned Adam on the same seeds; [] where it was not tuned.
        default: of AdamW as it comes, on the same seeds; [] where it was not run.
        timed: those default runs were made on this machine along with `runs`.
    """

    task: str
    runs: Sequence[Run]
    reference: Sequence[Run] = ()
    default: Sequence[Run] = ()
    timed: bool = False


def stand(measured: Measured) -> Standing:
    """How an optimizer did on one task."""
    runs, first = measured.runs, measured.runs[0]
    train, validation = _average(runs, "train"), _average(runs, "validation")
    accuracies = [run.accuracy for run in runs if run.accuracy is not None]
    step_ms = fmean(run.step_ms for run in runs)
    default_ms = fmean(run.step_ms for run in measured.default) if measured.timed and measured.default else None
    default = _average(measured.default, "train") if measured.default else None
    reference = measured.reference
    return Standing(
        task=measured.task,
        setting=f"{first.schedule} {first.lr:g}" if first.schedule else "",
        train=keep_finite(train),
        validation=keep_finite(validation),
        accuracy=fmean(accuracies) if len(accuracies) == len(runs) else None,
        train_ratio=keep_finite(train / _average(reference, "train")) if reference else None,
        validation_ratio=keep_finite(validation / _average(reference, "validation")) if reference else None,
        speedup=_compare_curves(runs, reference) if reference else None,
        beats_default=None if default is None else train < default,
        diverged=sum(run.diverged for run in runs),
        step_ms=step_ms,
        extra_ms=None if default_ms is None else step_ms - default_ms,
    )


def summarize(label: str, kind: str, measured: Sequence[Measured]) -> Row:
    """One optimizer over the tasks that it ran on."""
    standings = [stand(m) for m in measured]
    known = [s for s, m in zip(standings, measured, strict=True) if m.reference]
    beats = [s.beats_default for s in standings if s.beats_default is not None]
    extra = [s.extra_ms for s in standings if s.extra_ms is not None]

    def average(get: Callable[[Standing], float | None], missing: float) -> Interval | None:
        values = [missing if (value := get(s)) is None else value for s in known]
        return Interval(*average_middle_interval(values)) if values else None

    return Row(
        label=label,
        kind=kind,
        standings=standings,
        train=average(lambda s: s.train_ratio, inf),
        validation=average(lambda s: s.validation_ratio, inf),
        speedup=average(lambda s: s.speedup, 0.0),
        worse=sum(s.train_ratio is None or s.train_ratio > WORSE for s in known),
        better_than_default=fmean(beats) if beats else None,
        diverged=sum(s.diverged for s in standings),
        extra_ms=median(extra) if extra else None,
    )


def compare_rows(rule: Row, row: Row) -> Interval | None:
    """The final loss of one optimizer over that of another, paired by task: the interquartile mean over the tasks that
    both ran on.

    Where both diverged the ratio is 1.
    """
    theirs = {s.task: s.train for s in row.standings}
    pairs = [(s.train, theirs[s.task]) for s in rule.standings if s.task in theirs]
    ratios = [1.0 if a is b is None else inf if a is None else 0.0 if b is None else a / b for a, b in pairs]
    return Interval(*average_middle_interval(ratios)) if ratios else None


def list_worst(row: Row, count: int = 5) -> list[Standing]:
    """Where an optimizer loses: the tasks with the highest ratio to tuned Adam, above 1, the worst first; diverged
    ones before all.
    """
    losses = [s for s in row.standings if s.diverged or (s.train_ratio is not None and s.train_ratio > 1)]
    return sorted(losses, key=lambda s: -inf if s.train_ratio is None else -s.train_ratio)[:count]


def _average(runs: Sequence[Run], figure: str) -> float:
    """Geometric mean of a loss over seeds; infinite where one is not finite."""
    values = [getattr(run, figure) for run in runs]
    if None in values:
        return inf
    return exp(fmean(log(max(value, FLOOR)) for value in values))


def _compare_curves(runs: Sequence[Run], reference: Sequence[Run]) -> float | None:
    curves = [
        torch.tensor([[inf if v is None else v for v in run.curve] for run in side]) for side in (runs, reference)
    ]
    ours, theirs = (curve.double().mean(0) for curve in curves)
    return compute_speedup(ours, theirs)
