"""What a few-shot comparison looks like to people: a table in the terminal, and how losses fall step by step."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from lopt.evaluation.few_shot import FewShot, FewShotCell

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = ("#d03800", "#656d76", "#0072b2")
INTERVAL = 1.96  # standard errors, 95 % of a normal distribution


def print_few_shot(found: FewShot, console: Console) -> None:
    """Print the table: means over tasks with 95 % intervals, and the ratio to the best row below the first."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(found.task, style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("shots", "steps", *found.rows, "ratio to best"):
        table.add_column(heading, justify="right")
    for i, (k, n) in enumerate(found.columns):
        cells = [cells[i] for cells in found.rows.values()]
        table.add_row(str(k), str(n), *map(write_cell, cells), write_ratio(cells))
    console.print(table)
    text = f"Mean loss on {found.tasks} held-out tasks, with 95 % intervals. Others are tuned on other tasks:"
    console.print(Text(text))
    for label, cells in list(found.rows.items())[1:]:
        tuned = dict.fromkeys(cell.tuned for cell in cells)
        console.print(Text(f"  {label}: {'; '.join(tuned)}"), soft_wrap=True)


def write_ratio(cells: Sequence[FewShotCell]) -> str:
    """The first cell's mean over the lowest of the others', paired by task; a dash where there is none."""
    others = [cell for cell in cells[1:] if cell.loss.mean is not None and cell.ratio is not None]
    best = min(others, key=lambda cell: cell.loss.mean or 0.0, default=None)
    if best is None or best.ratio is None or best.ratio.value is None:
        return "\u2013"
    interval = "" if best.ratio.low is None else f" ({best.ratio.low:.3f} to {best.ratio.high:.3f})"
    return f"{best.ratio.value:.3f}{interval}"


def write_cell(cell: FewShotCell) -> str:
    """Mean and half of the 95 % interval; the median where some task diverged."""
    loss = cell.loss
    if loss.mean is None:
        return "diverges" if loss.median is None else f"diverges (median {loss.median:.3g})"
    return f"{loss.mean:.3f}" + ("" if loss.stderr is None else f" \u00b1 {INTERVAL * loss.stderr:.3f}")


def plot_few_shot(found: FewShot) -> bytes:
    """A PNG: for each number of shots the mean loss on queries after every step, one line for each row of the table."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    longest = {k: max(n for shots, n in found.columns if shots == k) for k, _ in found.columns}
    figure = Figure(figsize=(3.1 * len(longest), 2.9), layout="constrained")
    panels = figure.subplots(1, len(longest), sharey=True, squeeze=False)[0]
    for axes, (k, n) in zip(panels, longest.items(), strict=True):
        column = found.columns.index((k, n))
        for (label, cells), colour in zip(found.rows.items(), COLOURS, strict=True):
            curve = [float("nan") if x is None else x for x in cells[column].curve]
            axes.plot(curve, color=colour, label=label, linewidth=2, marker="o", markersize=3)
        axes.set(yscale="log", xlabel="steps of adaptation", title=f"{k} examples")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss on other points of the task")
    panels[-1].legend(frameon=False, fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
