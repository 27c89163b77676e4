"""What an evaluation looks like to people: a self-contained HTML page, pictures, JSON, and a table in the terminal.

Every sentence is computed from the numbers; nothing is said that the table does not show.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lopt.core.files import write_atomic
from lopt.evaluation.report.curves import plot_curves
from lopt.evaluation.report.html import encode_picture, load_template
from lopt.evaluation.report.numbers import format_number, format_ratio
from lopt.evaluation.report.sentences import state_sides, state_subject, state_summary, state_verdict
from lopt.evaluation.report.tables import build_rows, describe_searches, list_headings, list_units
from lopt.evaluation.results import FIGURES, Comparison, Contest, display_name, save_comparisons

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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
        {"number": format_number, "name": display_name, "ratio": format_ratio},
    )
    sections = [
        {
            "comparison": c,
            "verdict": state_verdict(c),
            "headings": list(zip(list_headings(c), list_units(c), strict=True)),
            "rows": build_rows(c),
            "sides": state_sides(c),
            "contests_by_baseline": _tabulate(c),
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
        subject=state_subject(comparisons),
        summary=state_summary(comparisons),
        sections=sections,
        command=command,
        figures=FIGURES,
    )


def _tabulate(comparison: Comparison) -> list[tuple[str, list[Contest | None]]]:
    """The subject against each baseline, in all figures that the task has: a name and a contest for each figure."""
    figures = [figure for figure in FIGURES if comparison.list_contests(figure)]
    order = [contest.against for contest in comparison.list_contests("final")]
    return [(display_name(name), [comparison.find_contest(figure, name) for figure in figures]) for name in order]


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table of one comparison, and below it the verdict, and where the rule is better and where worse.

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
    for sentence in state_sides(comparison):
        console.print(Text(sentence))
    console.print()


def write_table(comparison: Comparison, width: int) -> str:
    """What `print_table` prints, as text without colours, in lines of at most `width` characters."""
    from rich.console import Console

    text = StringIO()
    print_table(comparison, Console(file=text, width=width, force_jupyter=False, color_system=None))
    return text.getvalue().rstrip()


def render_table(comparison: Comparison) -> str:
    """The table of one comparison with its verdict, as a piece of HTML that takes its looks from the page around it.

    Raises:
        ImportError: jinja2 is missing.
    """
    rows, headings = build_rows(comparison), list_headings(comparison)
    template = load_template("table.html", {})
    return template.render(comparison=comparison, verdict=state_verdict(comparison), headings=headings, rows=rows)


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
