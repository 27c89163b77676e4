"""What an evaluation looks like to people: a self-contained HTML page, pictures, JSON, and a table in the terminal.

Every sentence is computed from the numbers; nothing is said that the table does not show.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from importlib.resources import files
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lopt.checkpoint import write_atomic
from lopt.evaluate.results import FIGURES, Comparison, Contest, Entry, display_name, save_comparisons
from lopt.evaluate.statistics import Summary
from lopt.plots import plot_curves

if TYPE_CHECKING:
    from rich.console import Console

NONE = "\u2013"
HEADINGS = ["", "final loss", "/ best tuned", "mean loss", "test accuracy", "speed-up", "diverged", "\u00b5s/step"]


class Cell(NamedTuple):
    """One figure of a table, as text, and whether it is the best of its column."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """One optimizer of a table: its name, the seven figures of `HEADINGS`, and what it was tuned to."""

    entry: Entry
    name: str
    cells: list[Cell]
    tuned_to: str


def write_report(
    folder: str | os.PathLike[str], comparisons: Sequence[Comparison], *, command: str = "", title: str = ""
) -> dict[str, Path]:
    """Write `report.html`, `evaluation.json` and one `curves-N.png` per comparison into `folder`.

    Args:
        folder: made if missing; files of an earlier report are replaced.
        command: that repeats the evaluation, shown to the reader.
        title: of the page; by default the first rule against tuned baselines.
    Returns:
        The paths, by file name.
    Raises:
        ValueError: there are no comparisons.
        OSError: the folder cannot be written.
    """
    target = Path(folder)
    html = render_report(comparisons, command=command, title=title)
    target.mkdir(parents=True, exist_ok=True)
    content = {"report.html": html.encode(), "evaluation.json": save_comparisons(comparisons)}
    for i, comparison in enumerate(comparisons, 1):
        content[f"curves-{i}.png"] = plot_curves([comparison])
    for name, data in content.items():
        write_atomic(target / name, data)
    return {name: target / name for name in content}


def render_report(comparisons: Sequence[Comparison], *, command: str = "", title: str = "") -> str:
    """The page: no scripts, no network, everything inline."""
    if not comparisons:
        raise ValueError("there is no comparison to report")
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "name": display_name, "percent": format_percent}
    template = environment.from_string(files("lopt").joinpath("templates/report.html").read_text())
    sections = [
        {
            "comparison": c,
            "verdict": state_verdict(c),
            "headings": HEADINGS,
            "rows": build_rows(c),
            "losses": [describe_loss(contest) for contest in c.list_losses()],
            "light": _as_data_uri(plot_curves([c], dpi=160)),
            "dark": _as_data_uri(plot_curves([c], dpi=160, dark=True)),
            "contests": {figure: c.contest_bar(figure) for figure in FIGURES},
        }
        for c in comparisons
    ]
    subject = comparisons[0].subject.label
    return template.render(
        title=title or f"{subject} against tuned baselines",
        summary=state_summary(comparisons),
        sections=sections,
        command=command,
        figures=FIGURES,
    )


def print_table(comparison: Comparison, console: Console) -> None:
    """The table of one comparison, and below it the verdict and the losses."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(comparison.title, style="bold"), title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in build_rows(comparison):
        subject = row.entry is comparison.subject
        name = Text(row.name, style="bold" if subject else "dim" if row.entry.kind == "default" else "")
        table.add_row(name, *(Text(cell.text, style="bold green" if cell.best else "") for cell in row.cells))
    console.print(table)
    console.print(Text(state_verdict(comparison)))
    lost = comparison.list_losses()
    if lost:
        console.print(Text(f"Where {comparison.subject.label} is worse:", style="bold"))
        for contest in lost:
            console.print(Text(f"  {describe_loss(contest)}"))
    console.print()


# -- sentences -------------------------------------------------------------------------------------


def state_summary(comparisons: Sequence[Comparison]) -> str:
    """One sentence over all settings."""
    if len(comparisons) == 1:
        return state_verdict(comparisons[0])
    contests = [c.contest_bar("final") for c in comparisons]
    held = [contest for contest in contests if contest is not None]
    lower = sum(contest.clear and not contest.lost for contest in held)
    higher = sum(contest.clear and contest.lost for contest in held)
    label = comparisons[0].subject.label
    return (
        f"Against the best tuned baseline of each of {len(comparisons)} settings, the final loss of {label} is lower "
        f"in {lower}, higher in {higher} and not clearly different in {len(comparisons) - lower - higher}."
    )


def state_verdict(comparison: Comparison) -> str:
    """The subject against the best tuned baseline, in final loss and in mean loss."""
    subject, tasks = comparison.subject, _count(comparison.num_seeds, "held-out task")
    contest = comparison.contest_bar("final")
    if contest is None:
        final = subject.summarize("final")
        return (
            f"On {tasks}, {subject.label} ends at a loss of {format_summary(final)}; no tuned baseline to compare with."
        )
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
        f"{format_number(contest.ours)} against {format_number(contest.theirs)}, {format_ratio(contest)}, and it is "
        f"the lower one on {format_percent(ratio.wins)} of the tasks."
    )
    mean = comparison.contest_bar("mean")
    if mean is None or mean.ratio.value is None:
        return text
    return f"{text} Its mean loss over the run is {format_ratio(mean)} of {display_name(mean.against)}'s."


def describe_loss(contest: Contest) -> str:
    """One line about a contest that is lost."""
    ours, theirs = contest.ours, contest.theirs
    if contest.figure == "test_error":
        values = f"{format_percent(ours)} against {format_percent(theirs)}"
    else:
        values = f"{format_number(ours) if ours is not None else 'diverged'} against {format_number(theirs)}"
    by = f", {format_ratio(contest)}" if contest.ratio.value is not None else ""
    unclear = "" if contest.clear else " (not clear: the interval contains 1)"
    return f"{FIGURES[contest.figure]}: {values} of {display_name(contest.against)}{by}{unclear}"


# -- tables ----------------------------------------------------------------------------------------


def build_rows(comparison: Comparison) -> list[Row]:
    """Learned rules, then baselines by final loss, then default Adam."""
    kinds = {"learned": 0, "tuned": 1, "default": 2}

    def key(entry: Entry) -> tuple[int, float]:
        final = entry.summarize("final")
        mean = float("inf") if final is None or final.mean is None else final.mean
        return kinds[entry.kind], 0.0 if entry.kind == "learned" else mean

    lowest = {figure: _find_lowest(comparison, figure) for figure in FIGURES}
    bar = comparison.find_bar("final")
    return [
        Row(entry, display_name(entry.label), _build_cells(comparison, entry, bar, lowest), describe_tuning(entry))
        for entry in sorted(comparison.entries, key=key)
    ]


def _build_cells(
    comparison: Comparison, entry: Entry, bar: Entry | None, lowest: dict[str, float | None]
) -> list[Cell]:
    """The figures of one row, in the order of `HEADINGS`."""
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
    speedup = NONE if run.speedup is None else f"{format_number(run.speedup, 2)}\u00d7"
    return [
        Cell(format_summary(final), is_best("final")),
        Cell(NONE if relative is None else f"{relative:.2f}"),
        Cell(format_summary(mean), is_best("mean")),
        Cell(NONE if error is None or error.mean is None else format_percent(1 - error.mean), is_best("test_error")),
        Cell(speedup),
        Cell(f"{run.diverged}/{comparison.num_seeds}" if run.diverged else "0"),
        Cell(format_number(1e6 * run.seconds_per_step, 2)),
    ]


def describe_tuning(entry: Entry) -> str:
    """Learning rate and schedule for the final loss and, where it differs, for the mean loss."""
    if entry.kind == "learned":
        return "nothing tuned"
    parts = [f"lr {format_number(run.lr)} {run.schedule}" for run in (entry.runs["final"], entry.runs["mean"])]
    return parts[0] if parts[0] == parts[1] else f"{parts[0]}; for the mean loss {parts[1]}"


def _find_lowest(comparison: Comparison, figure: str) -> float | None:
    found = [entry.summarize(figure) for entry in comparison.entries]
    return min((s.mean for s in found if s is not None and s.mean is not None), default=None)


# -- numbers ---------------------------------------------------------------------------------------


def format_number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, without an exponent where that is readable."""
    if value is None:
        return NONE
    if value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def format_percent(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f} %"


def format_summary(value: Summary | None) -> str:
    """Mean and standard error with as many decimals as the mean has; the median of what did not diverge."""
    if value is None:
        return NONE
    if value.mean is None:
        return "diverged" if value.median is None else f"diverged (median {format_number(value.median)})"
    mean = format_number(value.mean)
    if value.stderr is None or "e" in mean:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} \u00b1 {value.stderr:.{decimals}f}"


def format_ratio(contest: Contest) -> str:
    """ "0.73 times (0.61 to 0.85)"."""
    ratio = contest.ratio
    text = f"{format_number(ratio.value)} times"
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} ({format_number(ratio.low)} to {format_number(ratio.high)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _as_data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def describe_searches(comparison: Comparison) -> list[dict[str, Any]]:
    """Every search behind the tuned entries, for the page's appendix."""
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
