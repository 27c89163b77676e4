"""The picture of an evaluation: the median training loss of every optimizer on a log scale, and what each ends at.

Bands (quartiles over tasks) are drawn for the rule and for the best tuned baseline; nine of them would hide everything.

Figures are built without pyplot, so nothing of the user's matplotlib is touched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from lopt.evaluation.report.looks import (
    DARK,
    DEFAULT_STYLE,
    LIGHT,
    OTHER_STYLES,
    RC,
    STYLES,
    Label,
    Theme,
    dress_axes,
    label_ends,
    pick_style,
    set_log_scale,
)
from lopt.evaluation.results import FIGURES, Comparison, Entry, Numbers, Run, display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lopt.evaluation.report.figure import Picture

PANEL_INCHES = (6.3, 2.65)  # width with margins, height of the axes
MARGINS = (0.68, 2.0)  # left and right of the axes
AXES_INCHES = PANEL_INCHES[0] - sum(MARGINS)
TOP_INCHES, TITLE_INCHES, BOTTOM_INCHES = 0.7, 0.3, 0.74
VALUE_AT = 1 + (MARGINS[1] - 0.2) / AXES_INCHES
"""Right edge of the figures beside the labels, in widths of the axes."""


def plot_curves(comparisons: Sequence[Comparison], *, dark: bool = False, titles: bool = True, dpi: int = 200) -> bytes:
    """The picture of `draw_curves` as a PNG, with the same arguments and errors."""
    return draw_curves(comparisons, dark=dark, titles=titles, dpi=dpi).to_png()


def draw_curves(
    comparisons: Sequence[Comparison], *, dark: bool = False, titles: bool = True, dpi: int = 200
) -> Picture:
    """One panel per comparison, two of them side by side.

    Args:
        comparisons: at least one; the runs shown are those tuned for each one's `criterion`.
        dark: for dark pages.
        titles: write each comparison's title above its panel.
        dpi: of the picture, `PANEL_INCHES` per panel.
    Raises:
        ValueError: there is nothing to plot.
        ImportError: matplotlib is missing.
    """
    if not comparisons:
        raise ValueError("there is no comparison to plot")
    import matplotlib.style

    from lopt.evaluation.report.figure import Picture

    # Sizes are in inches and the panels are placed by hand, so that labels beside the axes have room.
    theme = DARK if dark else LIGHT
    columns = min(2, len(comparisons))
    rows = -(-len(comparisons) // columns)
    top = TOP_INCHES if titles else TOP_INCHES - TITLE_INCHES
    width, height = PANEL_INCHES[0] * columns, (PANEL_INCHES[1] + top + BOTTOM_INCHES) * rows
    with matplotlib.style.context(RC):
        figure = Picture((width, height), dpi=dpi, facecolor=theme.background)
        for i, comparison in enumerate(comparisons):
            row, column = divmod(i, columns)
            x = (column * PANEL_INCHES[0] + MARGINS[0]) / width
            y = 1 - ((row + 1) * height / rows - BOTTOM_INCHES) / height
            axes = figure.add_axes((x, y, AXES_INCHES / width, PANEL_INCHES[1] / height))
            _draw_panel(axes, comparison, theme, comparison.title if titles else "")
            _draw_labels(axes, comparison, theme)
    return figure


def _draw_panel(axes: Axes, comparison: Comparison, theme: Theme, title: str) -> None:
    # Limits come from what is shown, so that a run that diverged does not press the others into a line.
    entries = _order(comparison)
    limits = _find_limits([entry.runs[comparison.criterion] for entry in entries])
    banded = (comparison.subject, comparison.find_bar(comparison.criterion))
    set_log_scale(axes, limits)
    dress_axes(axes, theme)
    for rank, entry in enumerate(entries):
        run = entry.runs[comparison.criterion]
        color, dashes = _pick_style(comparison, entry, theme)
        subject = entry is comparison.subject
        # Bands for two curves only: nine of them would hide everything.
        if entry in banded:
            band = (_clip(run.low, limits), _clip(run.high, limits))
            axes.fill_between(run.steps, *band, color=color, alpha=0.22 if subject else 0.13, lw=0, zorder=2 + rank)
        axes.plot(
            run.steps,
            _clip(run.median, limits),
            color=color,
            ls=dashes,
            lw=2.5 if subject else 1.25,
            zorder=20 + rank,
            solid_capstyle="round",
        )
    axes.set_xlim(0, comparison.num_steps)
    axes.set_xlabel("training step", color=theme.text)
    axes.set_ylabel("training loss (log scale)", color=theme.text)
    # The caption says what lines and bands are, and names the baseline that has to be beaten.
    bar = banded[1]
    best = "" if bar is None else f" and {display_name(bar.label)}, the best tuned baseline on average"
    caption = f"Lines: medians over tasks; bands: quartiles, for {comparison.subject.label}{best}."

    def write(y: float, text: str, **look: Any) -> None:
        axes.text(-0.8 * MARGINS[0] / AXES_INCHES, y, text, transform=axes.transAxes, **look)

    write(1.125, textwrap.shorten(title, 62, placeholder=" ..."), color=theme.text, weight="bold", size=11)
    write(1.05, _describe(comparison), color=theme.faint, size=8)
    write(-0.25, caption, color=theme.faint, size=7)


def _describe(comparison: Comparison) -> str:
    """Number of tasks, and how the baselines were tuned."""
    figure = FIGURES[comparison.criterion]
    count = comparison.num_seeds
    tasks = f"{count} held-out {'task' if count == 1 else 'tasks'}"
    return f"{tasks}, the same for all; baselines tuned for the {figure}"


def _draw_labels(axes: Axes, comparison: Comparison, theme: Theme) -> None:
    """Names and mean losses at the ends of the curves; a curve that left the picture has its label at the top."""
    criterion, labels = comparison.criterion, []
    for entry in comparison.entries:
        run, style = entry.runs[criterion], _pick_style(comparison, entry, theme)
        value, bold = run.summarize(criterion).mean, entry is comparison.subject
        labels.append(Label(display_name(entry.label), value, run.median[-1], *style, bold))
    heading: dict[str, Any] = {"transform": axes.transAxes, "color": theme.faint, "size": 7, "ha": "right"}
    axes.text(VALUE_AT, 1.05, f"mean {FIGURES[criterion]}".replace("mean mean", "mean"), **heading)
    label_ends(axes, labels, height=PANEL_INCHES[1], value_at=VALUE_AT)


def _order(comparison: Comparison) -> list[Entry]:
    """Drawn first to last: the subject on top of all."""
    kinds = {"default": 0, "tuned": 1, "learned": 2}
    return sorted(comparison.entries, key=lambda e: (e is comparison.subject, kinds[e.kind]))


def _pick_style(comparison: Comparison, entry: Entry, theme: Theme) -> tuple[str, Any]:
    if entry is comparison.subject:
        return theme.subject, "-"
    if entry.kind == "learned":
        rank = comparison.entries.index(entry) - 1
        style = OTHER_STYLES[rank % len(OTHER_STYLES)]
    else:
        style = STYLES.get(entry.label, DEFAULT_STYLE)
    return pick_style(style, theme)


def _clip(values: Numbers, limits: tuple[float, float]) -> list[float]:
    """Diverged runs leave the picture at the top instead of tearing a hole."""
    low, high = limits[0] / 10, 10 * limits[1]
    return [high if v is None else min(max(v, low), high) for v in values]


def _find_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """From the lowest quartile shown to a little above the first losses."""
    lows = [v for run in runs for v in run.low if v is not None and v > 0]
    firsts = [v for run in runs for v in run.high[:1] if v is not None and isfinite(v) and v > 0]
    top = 1.6 * max(firsts, default=1.0)
    return min(0.8 * min(lows, default=top / 10), top / 2), top
