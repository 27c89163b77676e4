"""The table of a comparison, as the page and the terminal show it."""

from __future__ import annotations

from typing import Any, NamedTuple

from lopt.evaluation.report.numbers import (
    NONE,
    count_noun,
    format_number,
    format_percent,
    format_summary,
)
from lopt.evaluation.results import FIGURES, Comparison, Entry, display_name


class Cell(NamedTuple):
    """One figure of a table as readers see it.

    Attributes:
        text: with its unit and standard error; a dash for what there is not.
        best: it is the lowest loss or the highest accuracy of its column.
    """

    text: str
    best: bool = False


class Row(NamedTuple):
    """One optimizer of a table, in the page and in the terminal.

    Attributes:
        entry: what the row is about.
        name: for readers.
        cells: the figures that `list_headings` names.
        tuned_to: learning rate and schedule; "" if nothing was tuned.
    """

    entry: Entry
    name: str
    cells: list[Cell]
    tuned_to: str


def list_headings(comparison: Comparison) -> list[str]:
    """What the columns of figures are, in the page and in the terminal; tasks without an accuracy have no column for
    it.

    Returns:
        As many headings as a `Row` has cells, the most important first.
    """
    accuracy = ["test accuracy"] if comparison.subject.summarize("test_error") else []
    return ["final loss", "/ best tuned", "mean loss", *accuracy, "speed-up", "diverged", "\u00b5s/step"]


def list_units(comparison: Comparison) -> list[str]:
    """What the figures of each column are counted in, for the second line of the page's headings."""
    accuracy = ["of the test data"] if comparison.subject.summarize("test_error") else []
    error, tasks = "mean \u00b1 std. error", f"of {count_noun(comparison.num_seeds, 'task')}"
    return [error, "ratio", error, *accuracy, "\u00d7 tuned Adam", tasks, "one task"]


def build_rows(comparison: Comparison) -> list[Row]:
    """The table of one comparison: the subject first, then tuned baselines by final loss, other rules, and Adam with
    its default learning rate last. The best figure of each column is marked, whoever has it.
    """
    kinds = {"tuned": 1, "learned": 2, "default": 3}

    def key(entry: Entry) -> tuple[int, float]:
        final = entry.summarize("final")
        mean = float("inf") if final is None or final.mean is None else final.mean
        return 0 if entry is comparison.subject else kinds[entry.kind], mean

    lowest = {figure: _find_lowest(comparison, figure) for figure in FIGURES}
    bar = comparison.find_bar("final")
    return [
        Row(entry, display_name(entry.label), _build_cells(comparison, entry, bar, lowest), describe_tuning(entry))
        for entry in sorted(comparison.entries, key=key)
    ]


def _build_cells(
    comparison: Comparison, entry: Entry, bar: Entry | None, lowest: dict[str, float | None]
) -> list[Cell]:
    """The figures of one row, in the order of `list_headings`."""
    values = {figure: entry.summarize(figure) for figure in FIGURES}
    final, mean, error = values["final"], values["mean"], values["test_error"]

    def is_best(figure: str) -> bool:
        value = values[figure]
        return value is not None and value.mean is not None and value.mean == lowest[figure]

    run = entry.pick("final")
    reference = None if bar is None else bar.summarize("final")
    relative = None
    if final is not None and reference is not None and final.mean is not None and reference.mean:
        relative = final.mean / reference.mean
    speedup = NONE if run.speedup is None else f"{run.speedup:.2f}\u00d7"
    return [
        Cell(format_summary(final), is_best("final")),
        Cell(NONE if relative is None else f"{relative:.2f}"),
        Cell(format_summary(mean), is_best("mean")),
        *([] if error is None else [Cell(format_percent(1 - (error.mean or 0)), is_best("test_error"))]),
        Cell(speedup),
        Cell(f"{run.diverged}/{comparison.num_seeds}" if run.diverged else "0"),
        Cell(format_number(1e6 * run.seconds_per_step, 2)),
    ]


def describe_tuning(entry: Entry) -> str:
    """What a baseline was tuned to, as its row says it: learning rate and schedule of the run that was tuned for the
    final loss; "" for optimizers that nothing was tuned for.
    """
    run = entry.runs["final"]
    return "" if entry.kind != "tuned" else f"lr {format_number(run.lr)}, {run.schedule}"


def _find_lowest(comparison: Comparison, figure: str) -> float | None:
    summaries = [entry.summarize(figure) for entry in comparison.entries]
    return min((s.mean for s in summaries if s is not None and s.mean is not None), default=None)


def describe_searches(comparison: Comparison) -> list[dict[str, Any]]:
    """Every search behind the tuned entries, for the page's appendix: readers shall see that baselines were tuned, how
    widely and on how many tasks.

    Returns:
        A dict for each search: optimizer, schedule, lowest losses and best learning rates by criterion, first and last
        learning rate that were tried, their number, and the tuning tasks.
    """
    return [
        {
            "name": display_name(tuned.settings["rule"].partition("(")[0]),
            "schedule": tuned.settings["schedule"],
            "lowest": {c: tuned.lowest(c) for c in ("final", "mean")},
            "best": tuned.best,
            "first": tuned.trials[0].lr,
            "last": tuned.trials[-1].lr,
            "count": len(tuned.trials),
            "num_seeds": tuned.settings["num_seeds"],
        }
        for tuned in comparison.tuned
    ]
