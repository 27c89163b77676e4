"""Rules against tuned baselines on one setting: a task family, a horizon, a set of held-out seeds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import torch
from torch import Tensor

from lopt.evaluate.baselines import BASELINES, CRITERIA, OnSearch, Tuned, Tuning, read_version, tune_baseline
from lopt.evaluate.curves import Curves, run_curves
from lopt.evaluate.statistics import (
    Ratio,
    Summary,
    compare_paired,
    compute_speedup,
    keep_finite,
    summarize,
)
from lopt.rules import RULES, HandDesigned, Rule
from lopt.tasks import TaskFamily

FORMAT = 1
MAX_POINTS = 500
DEFAULT_LABEL = "adam, lr 0.001"
NAMES = {"final": "final loss", "mean": "mean loss", "test_error": "test error"}
"""What is compared, and what it is called; less is better for all of them."""


@dataclass(frozen=True)
class Run:
    """One optimizer as configured, on all seeds; None wherever a number is not finite.

    Attributes:
        config: the rule and its configuration.
        lr, schedule: of a hand-designed optimizer.
        first, final, mean, test_error: per seed; `test_error` is empty where the task has no accuracy.
        steps: the steps at which the curves below are kept.
        median, low, high, average: training-batch loss over seeds: median, quartiles, mean.
        diverged: number of seeds.
        seconds_per_step: wall-clock per step and task, all seeds batched together.
    """

    config: str
    lr: float | None
    schedule: str | None
    first: list[float | None]
    final: list[float | None]
    mean: list[float | None]
    test_error: list[float | None]
    steps: list[int]
    median: list[float | None]
    low: list[float | None]
    high: list[float | None]
    average: list[float | None]
    diverged: int
    seconds_per_step: float
    speedup: float | None

    def summarize(self, figure: str) -> Summary:
        """Over the seeds, of "final", "mean" or "test_error"."""
        return summarize(getattr(self, figure))


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison.

    Attributes:
        kind: "learned", "tuned" or "default".
        runs: for each of `CRITERIA` the run that was tuned for it; the same one twice where nothing is tuned.
    """

    label: str
    kind: str
    runs: dict[str, Run]

    def pick(self, figure: str) -> Run:
        """The run that a figure is read from; the test error is that of the run tuned for the final loss."""
        return self.runs["mean" if figure == "mean" else "final"]


@dataclass(frozen=True)
class Contest:
    """A rule against one other optimizer, on one of `NAMES`, seed by seed."""

    label: str
    against: str
    figure: str
    ours: float | None
    theirs: float | None
    ratio: Ratio


@dataclass(frozen=True)
class Comparison:
    """Everything that is known about one setting; plain data, see `to_json`.

    Attributes:
        title, note: for readers.
        task: description of the family.
        parameters: of one task.
        num_steps, num_seeds, seed: of the reported runs.
        criterion: one of `CRITERIA`; which runs the pictures show.
        entries: learned rules first (the first of them is the one that the report is about), then the rest.
        contests: every rule against every other entry.
        tuned: the searches behind the tuned entries.
        environment: versions and threads.
    """

    title: str
    note: str
    task: str
    parameters: int
    num_steps: int
    num_seeds: int
    seed: int
    criterion: str
    entries: list[Entry]
    contests: list[Contest]
    tuned: list[Tuned]
    environment: dict[str, str]
    format: int = field(default=FORMAT)

    @property
    def subject(self) -> Entry:
        """The rule that the report is about."""
        return self.entries[0]

    def find_bar(self, figure: str) -> Entry | None:
        """The best of the tuned baselines on the reported seeds; None if there are none or all diverged."""
        means = [(e, e.pick(figure).summarize(figure).mean) for e in self.entries if e.kind == "tuned"]
        finite = [(mean, i, e) for i, (e, mean) in enumerate(means) if mean is not None]
        return min(finite)[2] if finite else None

    def find_contest(self, label: str, against: str, figure: str) -> Contest | None:
        """The contest with these names, if it took place."""
        key = (label, against, figure)
        return next((c for c in self.contests if (c.label, c.against, c.figure) == key), None)

    def find_losses(self, label: str | None = None) -> list[Contest]:
        """Where the rule (the subject by default) is worse than a tuned or default baseline, worst first.

        A rule with a run that is not finite loses to everyone whose runs all are.
        """
        baselines = {e.label for e in self.entries if e.kind != "learned"}
        name = label or self.subject.label
        lost = [c for c in self.contests if c.label == name and c.against in baselines and _is_lost(c)]
        return sorted(lost, key=lambda c: (c.figure, -(c.ratio.value or float("inf"))))

    def to_json(self) -> dict[str, Any]:
        """Plain data without NaN or infinity; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """A comparison from what `to_json` made.

        Raises:
            ValueError: it is something else, or of another version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"not a comparison of format {FORMAT} (found {found!r}); run the evaluation again")
        try:
            return dacite.from_dict(cls, data, dacite.Config(strict=True, cast=[float]))
        except (dacite.DaciteError, TypeError, ValueError) as error:
            raise ValueError(f"damaged comparison: {error}") from error


def save_comparisons(comparisons: Sequence[Comparison]) -> bytes:
    """The JSON file of a report."""
    data = {"comparisons": [c.to_json() for c in comparisons]}
    return (json.dumps(data, allow_nan=False) + "\n").encode()


def load_comparisons(path: Path) -> list[Comparison]:
    """The comparisons of a report's JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file.
    """
    try:
        parts = json.loads(path.read_bytes())["comparisons"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the JSON of an evaluation ({error})") from error
    return [Comparison.from_json(part) for part in parts]


def compare(
    rules: Mapping[str, Rule],
    family: TaskFamily,
    num_steps: int,
    num_seeds: int = 20,
    *,
    seed: int = 0,
    baselines: Sequence[str] = BASELINES,
    tuning: Tuning = Tuning(),  # noqa: B008 (frozen)
    archive: Path | None = None,
    criterion: str = "final",
    title: str | None = None,
    note: str = "",
    on_search: OnSearch | None = None,
) -> Comparison:
    """Run rules, tuned baselines and default Adam on the same tasks.

    Args:
        rules: by label; the report is about the first, others (an untrained one, ...) are for comparison.
        num_seeds, seed: tasks 0 to `num_seeds` - 1 of the evaluation seed; none of them is used in tuning or, with
            the same seed, in meta-training.
        baselines: which of `BASELINES`; tuned once for the final and once for the mean loss.
        archive: folder of tuned results.
        criterion: which of the two runs of a baseline the pictures show.
        on_search: called before a search that is not archived.
    Raises:
        ValueError: no rules, an unknown baseline or criterion, or a label used twice.
    """
    _check(rules, baselines, criterion)
    tuned = [
        tune_baseline(name, schedule, family, num_steps, tuning, archive, on_search)
        for name in baselines
        for schedule in tuning.schedules
    ]
    seeds = torch.arange(num_seeds)

    def run(rule: Rule) -> Curves:
        return run_curves(rule, family, seeds, num_steps, seed=seed)

    # Rule, and its curves once per configuration: both criteria often choose the same learning rate.
    curves: dict[str, Curves] = {}
    chosen: list[tuple[str, str, dict[str, Rule]]] = [
        (label, "learned", dict.fromkeys(CRITERIA, rule)) for label, rule in rules.items()
    ]
    per_baseline = [tuned[i : i + len(tuning.schedules)] for i in range(0, len(tuned), len(tuning.schedules))]
    for name, searches in zip(baselines, per_baseline, strict=True):
        chosen.append((name, "tuned", {c: _build_best(name, searches, c) for c in CRITERIA}))
    chosen.append((DEFAULT_LABEL, "default", dict.fromkeys(CRITERIA, RULES["adam"](lr=1e-3))))
    keys = [{c: f"{label}/{_identify(r)}" for c, r in by.items()} for label, _, by in chosen]
    for names, (_, _, by) in zip(keys, chosen, strict=True):
        for c, key in names.items():
            if key not in curves:
                curves[key] = run(by[c])
    reference = next(
        (
            curves[k["final"]].losses.mean(1)
            for k, (label, kind, _) in zip(keys, chosen, strict=True)
            if label == "adam" and kind == "tuned"
        ),
        None,
    )
    entries = [
        Entry(label, kind, {c: _summarize_run(by[c], curves[k[c]], reference) for c in CRITERIA})
        for k, (label, kind, by) in zip(keys, chosen, strict=True)
    ]
    return Comparison(
        title=title or f"{family.describe()}, {num_steps} steps",
        note=note,
        task=family.describe(),
        parameters=family.spec.size,
        num_steps=num_steps,
        num_seeds=num_seeds,
        seed=seed,
        criterion=criterion,
        entries=entries,
        contests=[c for e in entries if e.kind == "learned" for c in _contest_all(e, entries)],
        tuned=tuned,
        environment=read_environment(),
    )


def read_environment() -> dict[str, str]:
    """Versions and threads that the figures were made with."""
    return {
        "lopt": read_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _check(rules: Mapping[str, Rule], baselines: Sequence[str], criterion: str) -> None:
    if not rules:
        raise ValueError("there is no rule to compare")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA}, got {criterion!r}")
    labels = [*rules, *baselines, DEFAULT_LABEL]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels must differ, these are used twice: {twice}")


def _build_best(name: str, searches: Sequence[Tuned], criterion: str) -> Rule:
    """The optimizer with the schedule and learning rate that were best on the tuning seeds."""
    best = min(searches, key=lambda tuned: tuned.lowest(criterion))
    lr = best.best[criterion]
    if lr is None:
        raise ValueError(
            f"no learning rate of {name} down to {best.trials[0].lr:.3g} keeps {best.settings['task']} finite for "
            f"{best.settings['num_steps']} steps; leave {name} out of the baselines"
        )
    return RULES[name](lr=lr, schedule=best.settings["schedule"])


def _identify(rule: Rule) -> str:
    return rule.describe()


def _summarize_run(rule: Rule, curves: Curves, reference: Tensor | None) -> Run:
    losses = curves.losses.double()
    num_steps, count = losses.shape[0] - 1, losses.shape[1]
    average = losses.mean(1)
    steps = torch.linspace(0, num_steps, min(num_steps, MAX_POINTS) + 1).round().long()
    # A run that is not finite ranks last: quartiles above it stay what they are.
    ranked = losses[steps].nan_to_num(nan=float("inf"))
    quantiles = [torch.quantile(ranked, q, dim=1) for q in (0.5, 0.25, 0.75)]
    hand_designed = isinstance(rule, HandDesigned)
    accuracy = curves.metrics.get("accuracy")
    return Run(
        config=rule.describe(),
        lr=float(rule.config["lr"]) if hand_designed else None,
        schedule=str(rule.config["schedule"]) if hand_designed else None,
        first=_as_list(losses[0]),
        final=_as_list(curves.final),
        mean=_as_list(curves.mean),
        test_error=[] if accuracy is None else _as_list(1 - accuracy),
        steps=steps.tolist(),
        median=_as_list(quantiles[0]),
        low=_as_list(quantiles[1]),
        high=_as_list(quantiles[2]),
        average=_as_list(average[steps]),
        diverged=int(curves.diverged.sum()),
        seconds_per_step=curves.seconds / (num_steps * count),
        speedup=None if reference is None else compute_speedup(average, reference),
    )


def _as_list(x: Tensor) -> list[float | None]:
    return [None if (v := keep_finite(y)) is None else float(f"{v:.6g}") for y in x.tolist()]


def _contest_all(entry: Entry, entries: Sequence[Entry]) -> list[Contest]:
    contests = []
    for other in entries:
        for figure in NAMES:
            ours, theirs = (getattr(e.pick(figure), figure) for e in (entry, other))
            if other is entry or not ours:
                continue
            values = [summarize(x).mean for x in (ours, theirs)]
            contests.append(
                Contest(entry.label, other.label, figure, *values, compare_paired(ours, theirs))
            )
    return contests


def _is_lost(contest: Contest) -> bool:
    if contest.theirs is None:
        return False
    return contest.ours is None or contest.ours > contest.theirs
