"""What an evaluation found: plain data that a report, a table or another program reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lopt.core.schema import conform
from lopt.evaluation.baselines import Tuned
from lopt.evaluation.statistics import Ratio, Summary, summarize

FORMAT = 1
FIGURES = {"final": "final loss", "mean": "mean loss", "test_error": "test error"}
"""What is compared, and what it is called; less is better for all of them."""

NAMES = {
    "sgd": "SGD",
    "momentum": "Momentum",
    "nesterov": "Nesterov",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
}

Numbers = list[float | None]
"""None stands for a number that is not finite."""


@dataclass(frozen=True)
class Run:
    """One optimizer as configured, on all seeds.

    Attributes:
        config: the rule and its configuration.
        lr, schedule: of a hand-designed optimizer.
        first, final, mean, test_error: per seed; `test_error` is empty where the task has no accuracy.
        steps: the steps at which the curves below are kept.
        median, low, high, average: training-batch loss over seeds: median, quartiles, mean.
        diverged: number of seeds.
        seconds_per_step: wall-clock per step and task, all seeds batched together.
        speedup: steps that tuned Adam needs for the same loss over steps that this run needs.
    """

    config: str
    lr: float | None
    schedule: str | None
    first: Numbers
    final: Numbers
    mean: Numbers
    test_error: Numbers
    steps: list[int]
    median: Numbers
    low: Numbers
    high: Numbers
    average: Numbers
    diverged: int
    seconds_per_step: float
    speedup: float | None

    def summarize(self, figure: str) -> Summary:
        """Over the seeds, one of `FIGURES` (or "first")."""
        return summarize(getattr(self, figure))


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison.

    Attributes:
        kind: "learned", "tuned" or "default".
        runs: by criterion ("final", "mean") the run that was tuned for it; the same twice where nothing is tuned.
    """

    label: str
    kind: str
    runs: dict[str, Run]

    def pick(self, figure: str) -> Run:
        """The run that a figure is read from; the test error is that of the run tuned for the final loss."""
        return self.runs["mean" if figure == "mean" else "final"]

    def summarize(self, figure: str) -> Summary | None:
        """One of `FIGURES` over the seeds; None where the task has no such figure."""
        run = self.pick(figure)
        return run.summarize(figure) if getattr(run, figure) else None


@dataclass(frozen=True)
class Contest:
    """A rule against one other optimizer, on one of `FIGURES`, paired by seed.

    Attributes:
        ours, theirs: means over seeds, None where a run is not finite.
    """

    label: str
    against: str
    figure: str
    ours: float | None
    theirs: float | None
    ratio: Ratio

    @property
    def lost(self) -> bool:
        """Whether the other one is better: lower on average, or the only one whose runs are all finite."""
        return self.theirs is not None and (self.ours is None or self.ours > self.theirs)

    @property
    def clear(self) -> bool:
        """Whether the interval of the ratio leaves out 1 (a rule that diverged is clearly worse)."""
        low, high = self.ratio.low, self.ratio.high
        if low is None or high is None:
            return self.ours is None or self.theirs is None
        return low > 1 or high < 1


@dataclass(frozen=True)
class Comparison:
    """Everything that is known about one setting: a task, a horizon, a set of held-out seeds.

    Attributes:
        title, note: for readers.
        task: description of the family.
        parameters: of one task.
        num_steps, num_seeds, seed: of the reported runs.
        criterion: "final" or "mean": which of a baseline's runs the pictures show.
        entries: learned rules first (the first of them is the one that the report is about), then the rest.
        contests: every learned rule against every other entry.
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

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("a comparison needs at least one entry")

    @property
    def subject(self) -> Entry:
        """The rule that the report is about."""
        return self.entries[0]

    def find_bar(self, figure: str) -> Entry | None:
        """The best of the tuned baselines on the reported seeds; None if there are none or all diverged."""
        tuned = [(e, e.summarize(figure)) for e in self.entries if e.kind == "tuned"]
        finite = [(s.mean, i, e) for i, (e, s) in enumerate(tuned) if s is not None and s.mean is not None]
        return min(finite)[2] if finite else None

    def find_contest(self, figure: str, against: str, label: str | None = None) -> Contest | None:
        """The subject (or the rule `label`) against another entry, if that took place."""
        key = (label or self.subject.label, against, figure)
        return next((c for c in self.contests if (c.label, c.against, c.figure) == key), None)

    def contest_bar(self, figure: str) -> Contest | None:
        """The subject against the best tuned baseline."""
        bar = self.find_bar(figure)
        return None if bar is None else self.find_contest(figure, bar.label)

    def list_losses(self) -> list[Contest]:
        """Where the subject is worse than a tuned or default baseline, by figure and worst first."""
        baselines = {e.label for e in self.entries if e.kind != "learned"}
        mine = [c for c in self.contests if c.label == self.subject.label and c.against in baselines]
        order = list(FIGURES)
        return sorted(
            (c for c in mine if c.lost),
            key=lambda c: (order.index(c.figure), -(c.ratio.value or float("inf"))),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data without NaN or infinity; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Comparison:
        """A comparison from what `to_json` made.

        Raises:
            ValueError: it is something else, or of another version.
        """
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if found != FORMAT:
            raise ValueError(f"expected a comparison of format {FORMAT}, found {found!r}; run the evaluation again")
        comparison: Comparison = conform(data, cls, "comparison")
        return comparison


def save_comparisons(comparisons: Sequence[Comparison], command: str = "") -> bytes:
    """The content of an evaluation's JSON file; `command` repeats the evaluation."""
    data = {"command": command, "comparisons": [c.to_json() for c in comparisons]}
    return (json.dumps(data, allow_nan=False) + "\n").encode()


def load_comparisons(path: Path) -> list[Comparison]:
    """The comparisons in an evaluation's JSON file; raises as `load_evaluation` does."""
    return load_evaluation(path)[0]


def load_evaluation(path: Path) -> tuple[list[Comparison], str]:
    """The comparisons in an evaluation's JSON file, and the command that repeats it ("" in older files).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file.
    """
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, found {type(data).__name__}")
        parts = conform(data.get("comparisons"), list[Any], "comparisons")
        return [Comparison.from_json(part) for part in parts], conform(data.get("command", ""), str, "command")
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of an evaluation: {error}") from error


def display_name(label: str) -> str:
    """What readers see: "Nesterov" for the baseline "nesterov", other labels as they are."""
    first, comma, rest = label.partition(",")
    return NAMES.get(first, first) + comma + rest
