"""What an evaluation found, as plain data that reports, tables and other programs read, and its JSON.

Nothing here computes with tensors; how it is shown is the affair of `lopt.evaluation.report`. A number that is not
finite is None everywhere, as JSON has no other way to say it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.core.documents import read_json
from lopt.core.schema import conform
from lopt.evaluation.baselines import Tuned
from lopt.evaluation.statistics import Ratio, Summary, summarize

if TYPE_CHECKING:
    from pandas import DataFrame

    from lopt.evaluation.report.figure import Picture

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
    """One optimizer as configured, on all seeds: its losses, its curves over the seeds, and its speed.

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
        """One figure of this run over its seeds, as tables show it.

        Args:
            figure: one of `FIGURES`, or "first" for the loss before any step.
        Returns:
            Mean, standard error and median; the first two None where a seed is not finite.
        """
        return summarize(getattr(self, figure))


@dataclass(frozen=True)
class Entry:
    """One optimizer of a comparison, under the label that tables show.

    Attributes:
        label: unique in its comparison.
        kind: "learned", "tuned" or "default".
        runs: by criterion ("final", "mean") the run that was tuned for it; the same twice where nothing is tuned.
    """

    label: str
    kind: str
    runs: dict[str, Run]

    def pick(self, figure: str) -> Run:
        """The run that a figure is read from: a baseline is judged by the run that was tuned for that figure.

        Args:
            figure: one of `FIGURES`; the test error is that of the run tuned for the final loss, as nothing is tuned
                for it.
        """
        return self.runs["mean" if figure == "mean" else "final"]

    def summarize(self, figure: str) -> Summary | None:
        """One of `FIGURES` over the seeds, from the run that was tuned for it.

        Returns:
            Mean, standard error and median, or None where the task has no such figure (no accuracy, hence no test
            error).
        """
        run = self.pick(figure)
        return run.summarize(figure) if getattr(run, figure) else None


@dataclass(frozen=True)
class Contest:
    """A rule against one other optimizer, on one of `FIGURES`, paired by seed: the row of a report's table of ratios.

    Attributes:
        label, against: of the two entries.
        ours, theirs: means over seeds, None where a run is not finite.
        ratio: of `ours` to `theirs`, with its interval.
    """

    label: str
    against: str
    figure: str
    ours: float | None
    theirs: float | None
    ratio: Ratio

    @property
    def lost(self) -> bool:
        """Whether the other one is better: lower on average, or the only one whose runs are all finite. Where both
        diverge nobody has lost.
        """
        return self.theirs is not None and (self.ours is None or self.ours > self.theirs)

    @property
    def clear(self) -> bool:
        """Whether the outcome is more than noise: the interval of the ratio leaves out 1. Without an interval (a single
        seed, or runs that are not finite) only divergence is a clear outcome.
        """
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
        about: what the subject is, in a line; "" if nobody says.
        source: what `rule=` of an optimizer takes to load it: a name or a path; "" if it is nowhere.
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
    about: str = ""
    source: str = ""
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("a comparison needs at least one entry")

    @property
    def subject(self) -> Entry:
        """The rule that the report is about: the first entry. Sentences, verdicts and the list of losses speak of it;
        other learned rules only stand beside it.
        """
        return self.entries[0]

    def find_bar(self, figure: str) -> Entry | None:
        """What the subject has to beat: of the tuned baselines the one that is best on the reported seeds.

        Args:
            figure: one of `FIGURES`.
        Returns:
            The entry with the lowest mean, the earlier one of equals; None if there are no tuned baselines or all
            diverged.
        """
        tuned = [(e, e.summarize(figure)) for e in self.entries if e.kind == "tuned"]
        finite = [(s.mean, i, e) for i, (e, s) in enumerate(tuned) if s is not None and s.mean is not None]
        return min(finite)[2] if finite else None

    def find_contest(self, figure: str, against: str, label: str | None = None) -> Contest | None:
        """The contest of a learned rule with another entry.

        Args:
            figure: one of `FIGURES`.
            against: label of the other entry.
            label: of the rule; by default the subject.
        Returns:
            None if there was no such contest, as where the task has no accuracy.
        """
        key = (label or self.subject.label, against, figure)
        return next((c for c in self.contests if (c.label, c.against, c.figure) == key), None)

    def contest_bar(self, figure: str) -> Contest | None:
        """The contest that a verdict is about: the subject against the tuned baseline that is best in this figure. None
        where there is no baseline to compare with.
        """
        bar = self.find_bar(figure)
        return None if bar is None else self.find_contest(figure, bar.label)

    def list_contests(self, figure: str) -> list[Contest]:
        """The subject against all tuned and default baselines.

        Args:
            figure: one of `FIGURES`.
        Returns:
            The worst ratio first, clear or not; nothing where the task has no such figure.
        """
        baselines = {e.label for e in self.entries if e.kind != "learned"}
        mine = [c for c in self.contests if c.label == self.subject.label and c.figure == figure]
        return sorted((c for c in mine if c.against in baselines), key=lambda c: -(c.ratio.value or float("inf")))

    def __repr__(self) -> str:
        return f"Comparison({self.title!r}: {', '.join(entry.label for entry in self.entries)})"

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 120) -> str:
        """The table that `lopt eval` prints, below it the verdict and where the rule is worse.

        Args:
            width: in characters; columns that do not fit are left out from the right.
        Raises:
            ImportError: rich is missing.
        """
        from lopt.evaluation.report.page import write_table

        return write_table(self, width)

    def plot(self, *, dark: bool = False) -> Picture:
        """The curves of all optimizers, with names and losses at their ends, as a figure of matplotlib's.

        A notebook shows it; `savefig` writes it in any format.

        Args:
            dark: for dark pages.
        Raises:
            ImportError: matplotlib is missing.
        """
        from lopt.evaluation.report.curves import draw_curves

        return draw_curves([self], dark=dark, dpi=110)

    def to_pandas(self) -> DataFrame:
        """All figures, one row for each optimizer and held-out task.

        Returns:
            Columns: `optimizer`, `kind` ("learned", "tuned" or "default"), `task` (from 0), `final` and `mean` (the two
            losses), and `test_error` where the task has an accuracy. What is not finite is NaN.
        Raises:
            ImportError: pandas is missing, which lopt does not need otherwise.
        """
        try:
            import pandas
        except ImportError as missing:
            raise ImportError(f"to_pandas needs pandas, which lopt does not bring along ({missing})") from missing

        rows = [
            {"optimizer": entry.label, "kind": entry.kind, "task": task}
            | {figure: getattr(entry.pick(figure), figure)[task] for figure in FIGURES if entry.summarize(figure)}
            for entry in self.entries
            for task in range(self.num_seeds)
        ]
        frame = pandas.DataFrame(rows)
        return frame.astype({figure: float for figure in FIGURES if figure in frame})

    def _repr_html_(self) -> str:
        from lopt.evaluation.report.page import render_table

        return render_table(self)

    def to_json(self) -> dict[str, Any]:
        """Everything as dicts, lists, texts and numbers without NaN or infinity, as the JSON of an evaluation holds it;
        `from_json` is its inverse.
        """
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Comparison:
        """A comparison from what `to_json` made, checked entry by entry, as files may come from anywhere.

        Args:
            data: what was read from JSON.
        Raises:
            ValueError: it is something else, or of another version.
        """
        version = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if version != FORMAT:
            raise ValueError(f"expected a comparison of format {FORMAT}, found {version!r}; run the evaluation again")
        comparison: Comparison = conform(data, cls, "comparison")
        return comparison


def save_comparisons(comparisons: Sequence[Comparison], command: str = "") -> bytes:
    """The content of an evaluation's JSON file, from which `lopt report` makes the page again.

    Args:
        comparisons: in the order of the page.
        command: that repeats the evaluation.
    Returns:
        UTF-8 text, one line.
    """
    data = {"command": command, "comparisons": [c.to_json() for c in comparisons]}
    return (json.dumps(data, allow_nan=False) + "\n").encode()


def load_comparisons(path: Path) -> list[Comparison]:
    """The comparisons in an evaluation's JSON file, for programs that go on with its figures.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file.
    """
    return load_evaluation(path)[0]


def load_evaluation(path: Path) -> tuple[list[Comparison], str]:
    """The comparisons in an evaluation's JSON file, and the command that repeats it ("" in older files).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file.
    """
    data = read_json(path)
    try:
        entries = conform(data.get("comparisons"), list[Any], "comparisons")
        return [Comparison.from_json(entry) for entry in entries], conform(data.get("command", ""), str, "command")
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of an evaluation: {error}") from error


def display_name(label: str) -> str:
    """What readers see instead of a label: "Nesterov" for the baseline "nesterov", "Adam, lr 0.001" for the default;
    labels of rules as they are.
    """
    optimizer, comma, options = label.partition(",")
    return NAMES.get(optimizer, optimizer) + comma + options
