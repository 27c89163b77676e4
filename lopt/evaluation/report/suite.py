"""What a suite's result looks like to people: a table and the worst tasks in the terminal, a page, and a picture.

The picture is the performance profile: for every ratio to tuned Adam's final loss, the share of tasks on which an
optimizer is at or below it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lopt.core.files import write_atomic
from lopt.evaluation.report.html import encode_picture, load_template
from lopt.evaluation.report.looks import DARK, LIGHT, OTHER_STYLES, STYLES, Theme
from lopt.evaluation.report.numbers import NONE, count_noun, format_number, format_percent
from lopt.evaluation.report.tables import Cell
from lopt.evaluation.suites import find_task
from lopt.evaluation.suites.archive import NUM_SEEDS
from lopt.evaluation.suites.figures import WORSE, Interval, Row, Standing, SuiteResult, list_worst

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RESULT = "suite.json"
HEADINGS = ("final loss", "rule / it", "validation", "speed-up", f"> {WORSE:g}", "diverged", "beats AdamW", "+ms")
"""Of a suite's table: ratios to tuned Adam (but for "rule / it", the rule's losses over those of the row), then counts,
the share of tasks that beat AdamW 1e-3, and cost per step."""
UNITS = (
    "ratio to tuned Adam",
    "ratio",
    "loss, ratio",
    "\u00d7 tuned Adam",
    "tasks",
    "runs",
    "of the tasks",
    "ms a step",
)
"""Of the columns of `HEADINGS`, for the second line of the page's headings."""
SHOWN = ("best of all tuned", "SOAP", "Muon", "AdamW 0.001")
"""Of the contenders in the picture, beside the rule."""
REACH = 20.0
"""Ratios from 1 / this to this are drawn."""


def write_suite(folder: Path, result: SuiteResult) -> dict[str, Path]:
    """Write the page, the picture and the JSON of a result.

    Returns:
        The paths, by file name.
    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "suite.html": render_suite(result).encode(),
        RESULT: (json.dumps(result.to_json(), allow_nan=False, indent=1) + "\n").encode(),
        "profile.png": plot_profile(result),
    }
    return {name: write_atomic(folder / name, data) for name, data in content.items()}


def load_suite(path: Path) -> SuiteResult:
    """A result from its JSON, for programs that go on with its figures.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    try:
        return SuiteResult.from_json(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is not the JSON of a suite's result: {error}") from error


def render_suite(result: SuiteResult) -> str:
    """The page of a result as HTML: one file, without scripts or network.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    template = load_template("suite.html", {"number": format_number, "percent": format_percent})
    beside = [row for row in result.rows[1:] if row.label in SHOWN and row.kind != "one rate"]
    ratios = [{s.task: s.train_ratio for s in row.standings} for row in beside]
    tasks = [(find_task(s.task), s, [ratio.get(s.task) for ratio in ratios]) for s in result.rule.standings]
    return template.render(
        result=result,
        verdict=state_verdict(result),
        headings=list(zip(HEADINGS, UNITS, strict=True)),
        rows=[(row, name_row(result, row), build_cells(row)) for row in result.rows],
        worst=list_worst(result.rule),
        tasks=tasks,
        beside=[name_row(result, row) for row in beside],
        light=encode_picture(plot_profile(result)),
        dark=encode_picture(plot_profile(result, dark=True)),
    )


def print_suite(result: SuiteResult, console: Console) -> None:
    """Print the table of a result without its intervals, its verdict, and where the rule loses."""
    from rich.text import Text

    # Columns that do not fit the console's width are left out from the right, so that no line is broken.
    unbounded, columns = console.options.update(max_width=1000), len(HEADINGS)
    while columns > 1 and console.measure(_build_table(result, columns), options=unbounded).maximum > console.width:
        columns -= 1
    console.print(_build_table(result, columns))
    console.print(Text(state_verdict(result)))
    for standing in list_worst(result.rule):
        console.print(Text(f"  {describe_loss(standing)}"))
    if result.untuned:
        command = f"python -m bench suite {result.suite} --seeds {max(NUM_SEEDS, result.seeds)}"
        todo = f"run `{command}` in a checkout"
        console.print(Text(f"No tuned Adam is archived for {', '.join(result.untuned)}: {todo}."))


def _build_table(result: SuiteResult, columns: int) -> Table:
    """The names and the first `columns` figures, without intervals."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(("", *HEADINGS[:columns])):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in result.rows:
        style = "bold" if row.kind == "rule" else "dim" if row.kind == "default" else ""
        values = [Text(cell.text.partition(" ")[0]) for cell in build_cells(row)[:columns]]
        table.add_row(Text(name_row(result, row), style=style), *values)
    return table


def state_verdict(result: SuiteResult) -> str:
    """The sentence that sums a result up."""
    rule, tasks = result.rule, len(result.rule.standings)
    known = tasks - len(result.untuned)
    among = "" if known == tasks else f"the {known} with a tuned Adam of "
    where = f"{among}{count_noun(tasks, f'{result.suite} task')}, {count_noun(result.seeds, 'seed')}"
    runs = f"; run {result.heldout_runs} of this rule on the held-out suite" if result.heldout_runs else ""
    if not known or rule.train is None or rule.validation is None:
        return f"On {where.removeprefix(among)}: no tuned Adam to compare with{runs}."
    worst = list_worst(rule)
    losing = (
        f"It is above it on {count_noun(len(list_worst(rule, tasks)), 'task')}:"
        if worst
        else "It is above it on no task."
    )
    return (
        f"On {where}, {rule.label} ends at {format_interval(rule.train)} of tuned Adam's loss and at "
        f"{format_interval(rule.validation)} of its validation loss (interquartile means over tasks, 95 % intervals)"
        f"{runs}. {losing}"
    )


def describe_loss(standing: Standing) -> str:
    """A task on which the rule loses, with by how much."""
    if standing.train_ratio is None:
        return f"{standing.task}: diverged in {standing.diverged} runs"
    return f"{standing.task}: {format_number(standing.train_ratio)} of tuned Adam's final loss"


def name_row(result: SuiteResult, row: Row) -> str:
    """The optimizer of a row with what was tuned of it, and on how many tasks if not on all."""
    kind = row.kind if row.kind in ("tuned", "one rate") and "tuned" not in row.label else ""
    tasks = len(row.standings)
    few = f"{tasks} tasks only" if tasks < len(result.rule.standings) else ""
    return ", ".join(filter(None, [row.label, kind, few]))


def build_cells(row: Row) -> list[Cell]:
    """The figures of a row, in the order of `HEADINGS`."""
    speedup = NONE if row.speedup is None else f"{row.speedup.value:.2f}\u00d7"
    known = any(s.train_ratio is not None or s.diverged for s in row.standings)
    return [
        Cell(format_interval(row.train)),
        Cell(format_interval(row.against)),
        Cell(format_interval(row.validation)),
        Cell(speedup),
        Cell(str(row.worse) if known else NONE),
        Cell(str(row.diverged)),
        Cell(NONE if row.better_than_default is None else f"{row.better_than_default:.0%}"),
        Cell(NONE if row.extra_ms is None else f"{row.extra_ms:.2f}"),
    ]


def format_interval(interval: Interval | None) -> str:
    """An interquartile mean with its interval: "0.72 (0.55 - 0.90)"; a dash for None."""
    if interval is None:
        return NONE
    value, low, high = (format_number(v, 2) for v in (interval.value, interval.low, interval.high))
    return f"{value} ({low} \u2013 {high})"


def plot_profile(result: SuiteResult, *, dark: bool = False) -> bytes:
    """The performance profile of a result as a PNG: the rule, and some of the contenders.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    theme = DARK if dark else LIGHT
    with matplotlib.style.context(["default", {"font.sans-serif": ["DejaVu Sans"], "font.size": 9}]):
        figure = Figure((6.8, 3.4), dpi=160, facecolor=theme.background)
        axes = figure.add_axes((0.09, 0.14, 0.62, 0.8), facecolor=theme.background)
        axes.set_xscale("log")
        axes.axvline(1, color=theme.faint, lw=0.8)
        shown = [result.rule, *(r for r in result.rows[1:] if r.label in SHOWN and r.kind != "one rate")]
        # The rule is drawn last, on top of the others.
        for i, row in reversed(list(enumerate(shown))):
            color, dashes = (theme.subject, "-") if i == 0 else _pick_style(i, theme)
            x, y = _profile(row)
            axes.step(
                x,
                y,
                where="post",
                color=color,
                ls=dashes,
                lw=2.5 if i == 0 else 1.4,
                label=_break(name_row(result, row)),
            )
        axes.set_xlim(1 / REACH, REACH)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color=theme.grid, lw=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(which="both", colors=theme.faint, labelcolor=theme.text, length=0)
        axes.set_xlabel("final loss / tuned Adam's", color=theme.text)
        axes.set_ylabel("tasks at or below", color=theme.text)
        handles, labels = axes.get_legend_handles_labels()
        legend: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "frameon": False}
        axes.legend(handles[::-1], labels[::-1], labelcolor=theme.text, **legend)
        stream = BytesIO()
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _break(label: str) -> str:
    """In lines that have room beside the axes."""
    return fill(label, 22)


def _profile(row: Row) -> tuple[Sequence[float], Sequence[float]]:
    """Ratios in order, and the shares of tasks that are at or below; runs that diverged are never reached."""
    known = [s for s in row.standings if s.train_ratio is not None or s.diverged]
    ratios = sorted(s.train_ratio for s in known if s.train_ratio is not None)
    shares = [(i + 1) / len(known) for i in range(len(ratios))]
    last = shares[-1] if shares else 0.0
    return [1e-6, *ratios, 1e6], [0.0, *shares, last]


def _pick_style(index: int, theme: Theme) -> tuple[str, Any]:
    """Colours of the contenders, those of the baselines in the pictures of curves."""
    styles = [STYLES["adam"], STYLES["nesterov"], STYLES["rmsprop"], *OTHER_STYLES]
    style = styles[(index - 1) % len(styles)]
    return style[1 if theme is DARK else 0], style[2]
