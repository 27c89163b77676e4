"""What an evaluation looks like to people: a self-contained HTML page, pictures, JSON, and a table in the terminal.

Every sentence is computed from the numbers; nothing is said that the table does not show.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lopt.core.files import write_atomic
from lopt.evaluation.report.curves import plot_curves
from lopt.evaluation.report.html import encode_picture, load_template
from lopt.evaluation.results import FIGURES, Comparison, Contest, Entry, display_name, save_comparisons
from lopt.evaluation.statistics import Summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NONE = "\u2013"


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


def write_report(
    folder: str | os.PathLike[str], comparisons: Sequence[Comparison], *, command: str = ""
) -> dict[str, Path]:
    """Write `report.html`, `evaluation.json` and one `curves-N.png` per comparison into `folder`.

    Args:
        folder: made if missing; files of an earlier report are replaced.
        command: that repeats the evaluation, shown to the reader.
    Returns:
        The paths, by file name.
    Raises:
        ValueError: there are no comparisons.
        OSError: the folder cannot be written.
    """
    target = Path(folder)
    html = render_report(comparisons, command=command)
    target.mkdir(parents=True, exist_ok=True)
    content = {"report.html": html.encode(), "evaluation.json": save_comparisons(comparisons, command)}
    for i, comparison in enumerate(comparisons, 1):
        content[f"curves-{i}.png"] = plot_curves([comparison])
    for name, data in content.items():
        write_atomic(target / name, data)
    return {name: target / name for name in content}


def render_report(comparisons: Sequence[Comparison], *, command: str = "") -> str:
    """The page of an evaluation as HTML: no scripts, no network, pictures inline, labels escaped, so that one file can
    be sent around and opened anywhere.

    Args:
        comparisons: each a section.
        command: that repeats the evaluation, shown to the reader.
    Raises:
        ValueError: there are no comparisons.
        ImportError: jinja2 or matplotlib is missing.
    """
    if not comparisons:
        raise ValueError("there is no comparison to report")
    template = load_template(
        "report.html",
        {"number": format_number, "name": display_name, "figure": format_figure, "ratio": format_ratio},
    )
    sections = [
        {
            "comparison": c,
            "verdict": state_verdict(c),
            "headings": list_headings(c),
            "rows": build_rows(c),
            "losses": c.list_losses(),
            "light": encode_picture(plot_curves([c], titles=False, dpi=160)),
            "dark": encode_picture(plot_curves([c], titles=False, dpi=160, dark=True)),
            "searches": describe_searches(c),
            "contests": {figure: c.contest_bar(figure) for figure in FIGURES},
        }
        for c in comparisons
    ]
    subject = comparisons[0].subject.label
    return template.render(
        title=f"{subject} against tuned baselines",
        summary=state_summary(comparisons),
        sections=sections,
        command=command,
        figures=FIGURES,
    )


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table of one comparison, and below it the verdict and where the rule is worse.

    Columns that do not fit the console's width are left out from the right, so that no line is broken.
    """
    from rich.text import Text

    console.print(Text(comparison.title, style="bold"))
    columns = len(list_headings(comparison))
    unbounded = console.options.update(max_width=1000)
    while columns > 1 and console.measure(_build_table(comparison, columns), options=unbounded).maximum > console.width:
        columns -= 1
    console.print(_build_table(comparison, columns))
    console.print(Text(state_verdict(comparison)))
    lost = comparison.list_losses()
    for figure in dict.fromkeys(contest.figure for contest in lost):
        worse = [f"{display_name(c.against)} {format_figure(c, c.theirs)}" for c in lost if c.figure == figure]
        ours = next(format_figure(c, c.ours) for c in lost if c.figure == figure)
        console.print(Text(f"Worse in {FIGURES[figure]} ({ours}) than {', '.join(worse)}."))
    console.print()


def _build_table(comparison: Comparison, columns: int) -> Table:
    """The names and the first `columns` figures."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in list_headings(comparison)[:columns]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in build_rows(comparison):
        subject = row.entry is comparison.subject
        name = Text(row.name, style="bold" if subject else "dim" if row.entry.kind == "default" else "", no_wrap=True)
        cells = (Text(cell.text, style="bold green" if cell.best else "") for cell in row.cells[:columns])
        table.add_row(name, *cells)
    return table


# -- sentences -------------------------------------------------------------------------------------


def state_summary(comparisons: Sequence[Comparison]) -> str:
    """One sentence over all settings of an evaluation, for the head of its page: in how many the final loss of the
    first rule is clearly lower, clearly higher, or neither, than that of the best tuned baseline.
    """
    if len(comparisons) == 1:
        return state_verdict(comparisons[0])
    contests = [contest for c in comparisons if (contest := c.contest_bar("final")) is not None]
    lower = sum(contest.clear and not contest.lost for contest in contests)
    higher = sum(contest.clear and contest.lost for contest in contests)
    counts = {"lower": lower, "higher": higher, "not clearly different": len(contests) - lower - higher}
    outcomes = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
    label = comparisons[0].subject.label
    if not contests:
        return f"{label} in {len(comparisons)} settings, without a tuned baseline to compare with."
    settings = count_noun(len(contests), "setting")
    return f"In {settings}, the final loss of {label} against that of the best tuned baseline is {outcomes}."


def state_verdict(comparison: Comparison) -> str:
    """The sentence that sums up one setting: the subject against the best tuned baseline, in final loss and in mean
    loss, with the interval of the ratio; divergence and missing baselines are said instead.
    """
    subject, tasks = comparison.subject, count_noun(comparison.num_seeds, "held-out task")
    contest = comparison.contest_bar("final")
    if contest is None:
        final = subject.summarize("final")
        return (
            f"On {tasks}, {subject.label} ends at a loss of {format_summary(final)}; no tuned baseline to compare with."
        )
    # Divergence first: no ratio can be computed from it, and a reader must not miss it.
    against = display_name(contest.against)
    if contest.ours is None:
        diverged = subject.pick("final").diverged
        return (
            f"{subject.label} diverges on {diverged} of {tasks}; the best tuned baseline, {against}, ends at "
            f"{format_number(contest.theirs)}."
        )
    ratio = contest.ratio
    verdict = "not clearly different from" if not contest.clear else "higher than" if contest.lost else "lower than"
    text = (
        f"On {tasks}, the final loss of {subject.label} is {verdict} that of the best tuned baseline, {against}: "
        f"{format_number(contest.ours)} against {format_number(contest.theirs)}, "
        f"a ratio of {format_ratio(contest)}. It is the lower one on {ratio.wins:.0%} of the tasks."
    )
    # The mean loss is compared with the baseline that is best in it, which may be another one.
    mean = comparison.contest_bar("mean")
    if mean is None or mean.ratio.value is None:
        return text
    return f"{text} The ratio of mean losses over the run, to {display_name(mean.against)}, is {format_ratio(mean)}."


# -- tables ----------------------------------------------------------------------------------------


def list_headings(comparison: Comparison) -> list[str]:
    """What the columns of figures are, in the page and in the terminal; tasks without an accuracy have no column for
    it.

    Returns:
        As many headings as a `Row` has cells, the most important first.
    """
    accuracy = ["test accuracy"] if comparison.subject.summarize("test_error") else []
    return ["final loss", "/ best tuned", "mean loss", *accuracy, "speed-up", "diverged", "\u00b5s/step"]


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


# -- numbers ---------------------------------------------------------------------------------------


def format_number(value: float | None, digits: int = 3) -> str:
    """A number for tables: significant digits, without an exponent from 0.0001 to 100,000, where readers compare by
    eye.

    Args:
        value: None gives a dash.
        digits: that are significant.
    """
    if value is None:
        return NONE
    if value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def format_percent(value: float | None) -> str:
    """A share as a percentage with one decimal, for accuracies and test errors; a dash for None."""
    return NONE if value is None else f"{100 * value:.1f} %"


def format_summary(value: Summary | None) -> str:
    """Mean and standard error of a figure, to equally many decimals, as many as the error asks for.

    Without a finite mean it says "diverged", with the median if that is finite; a dash stands for a figure that there
    is not.
    """
    if value is None:
        return NONE
    if value.mean is None:
        return "diverged" if value.median is None else f"diverged (median {format_number(value.median)})"
    mean = format_number(value.mean)
    if not value.stderr or "e" in mean:
        return mean
    decimals = max(len(mean.partition(".")[2]), -floor(log10(value.stderr)))
    return f"{value.mean:.{decimals}f} \u00b1 {value.stderr:.{decimals}f}"


def format_figure(contest: Contest, value: float | None) -> str:
    """One side of a contest in the unit of its figure: a percentage for test errors, a number for losses, "diverged"
    for None.
    """
    if value is None:
        return "diverged"
    return format_percent(value) if contest.figure == "test_error" else format_number(value)


def format_ratio(contest: Contest) -> str:
    """A ratio of means with its 95 % interval, such as "0.73 (0.61 to 0.85)"; without an interval for a single seed,
    and a dash where a run diverged.
    """
    ratio = contest.ratio
    text = format_number(ratio.value)
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} ({format_number(ratio.low)} to {format_number(ratio.high)})"


def count_noun(number: int, noun: str) -> str:
    """A count as readers see it: "1 task", "3 tasks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
