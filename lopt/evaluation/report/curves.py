"""The picture of an evaluation: the median training loss of every optimizer on a log scale, and what each ends at.

Bands (quartiles over tasks) are drawn for the rule and for the best tuned baseline; nine of them would hide everything.

Colours are Okabe & Ito's (safe for colour-blind readers) or shades of them; optimizers of one family share a hue and
differ by dashes. Figures are built without pyplot, so nothing of the user's matplotlib is touched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from math import isfinite, log10
from typing import TYPE_CHECKING, Any, NamedTuple

from lopt.evaluation.results import FIGURES, Comparison, Entry, Numbers, Run, display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (6.3, 2.65)  # width with margins, height of the axes
MARGINS = (0.68, 2.0)  # left and right of the axes
AXES_INCHES = PANEL_INCHES[0] - sum(MARGINS)
TOP_INCHES, TITLE_INCHES, BOTTOM_INCHES = 0.7, 0.3, 0.74
LABEL_GAP = 11.5
"""Distance of neighbouring labels in points."""
VALUE_AT = 1 + (MARGINS[1] - 0.2) / AXES_INCHES
"""Right edge of the figures beside the labels, in widths of the axes."""


class Theme(NamedTuple):
    """Colours of everything that is not a curve, and of the first rule, for a light or a dark page.

    Attributes:
        background: the page's own, so that a picture has no frame.
        text, faint: of what is read first, and second.
        grid: lines behind the curves.
        subject: the curve that the picture is about.
    """

    background: str
    text: str
    faint: str
    grid: str
    subject: str


LIGHT = Theme("#ffffff", "#1f2328", "#656d76", "#e7eaee", "#d03800")
DARK = Theme("#0d1117", "#e6edf3", "#8d96a0", "#262c36", "#ff7b39")

Style = tuple[str, str, Any]
"""Colour on a light and on a dark page, dashes."""
STYLES: dict[str, Style] = {
    "nesterov": ("#0072b2", "#4aa8e8", "-"),
    "momentum": ("#0072b2", "#4aa8e8", (0, (4, 1.6))),
    "sgd": ("#0072b2", "#4aa8e8", (0, (1, 1.4))),
    "adam": ("#007f5f", "#2fbf95", "-"),
    "adamw": ("#007f5f", "#2fbf95", (0, (4, 1.6))),
    "nadamw": ("#007f5f", "#2fbf95", (0, (1, 1.4))),
    "rmsprop": ("#a8447f", "#e08cc0", "-"),
}
DEFAULT_STYLE: Style = ("#8c959f", "#7d8590", (0, (4, 1.6)))
OTHER_STYLES: list[Style] = [("#b07a00", "#f0b93a", "-"), ("#b07a00", "#f0b93a", (0, (4, 1.6)))]
"""Of further learned rules."""


def plot_curves(comparisons: Sequence[Comparison], *, dark: bool = False, titles: bool = True, dpi: int = 200) -> bytes:
    """One panel per comparison, two of them side by side, as a PNG.

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Sizes are in inches and the panels are placed by hand, so that labels beside the axes have room.
    theme = DARK if dark else LIGHT
    columns = min(2, len(comparisons))
    rows = -(-len(comparisons) // columns)
    top = TOP_INCHES if titles else TOP_INCHES - TITLE_INCHES
    width, height = PANEL_INCHES[0] * columns, (PANEL_INCHES[1] + top + BOTTOM_INCHES) * rows
    with matplotlib.style.context(["default", {"font.sans-serif": ["DejaVu Sans"], "font.size": 9}]):
        figure = Figure((width, height), dpi=dpi, facecolor=theme.background)
        for i, comparison in enumerate(comparisons):
            row, column = divmod(i, columns)
            x = (column * PANEL_INCHES[0] + MARGINS[0]) / width
            y = 1 - ((row + 1) * height / rows - BOTTOM_INCHES) / height
            axes = figure.add_axes((x, y, AXES_INCHES / width, PANEL_INCHES[1] / height))
            _draw_panel(axes, comparison, theme, comparison.title if titles else "")
            _draw_labels(axes, comparison, theme)
        stream = BytesIO()
        FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _draw_panel(axes: Axes, comparison: Comparison, theme: Theme, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # Limits come from what is shown, so that a run that diverged does not press the others into a line.
    entries = _order(comparison)
    limits = _find_limits([entry.runs[comparison.criterion] for entry in entries])
    banded = (comparison.subject, comparison.find_bar(comparison.criterion))
    axes.set_yscale("log")
    axes.set_facecolor(theme.background)
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
    # Plain numbers at the ticks, as losses are not powers of ten.
    axes.set_xlim(0, comparison.num_steps)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=tuple(range(2, 10)), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=theme.grid, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, length=3)
    axes.tick_params(axis="y", which="both", length=0)
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
    """Names at the ends of the curves, moved apart where they would overlap."""
    # Labels are sorted by where their curves end; a curve that left the picture has its label at the top.
    bottom, top = axes.get_ylim()
    height = 72 * PANEL_INCHES[1]
    anchors = []
    for entry in comparison.entries:
        last = entry.runs[comparison.criterion].median[-1]
        shown = top if last is None else min(max(last, bottom), top)
        share = log10(shown / bottom) / log10(top / bottom)
        anchors.append((share * height, entry))
    anchors.sort(key=lambda anchor: anchor[0])
    places = spread_labels([y for y, _ in anchors], LABEL_GAP, height)
    heading: dict[str, Any] = {"transform": axes.transAxes, "color": theme.faint, "size": 7, "ha": "right"}
    axes.text(VALUE_AT, 1.05, f"mean {FIGURES[comparison.criterion]}".replace("mean mean", "mean"), **heading)
    for (y, entry), place in zip(anchors, places, strict=True):
        color, dashes = _pick_style(comparison, entry, theme)
        subject = entry is comparison.subject
        ends = [share / height for share in (y, place, place)]
        axes.plot(
            [1.01, 1.04, 1.07],
            ends,
            transform=axes.transAxes,
            color=color,
            ls=dashes,
            lw=2.5 if subject else 1.1,
            clip_on=False,
        )
        look: dict[str, Any] = {"transform": axes.transAxes, "color": color, "va": "center_baseline"}
        look |= {"size": 8.5, "weight": "bold"} if subject else {"size": 8}
        axes.text(1.085, ends[1], textwrap.shorten(display_name(entry.label), 18, placeholder="..."), **look)
        value = entry.runs[comparison.criterion].summarize(comparison.criterion).mean
        axes.text(VALUE_AT, ends[1], "diverged" if value is None else f"{value:#.3g}", ha="right", **look)


def spread_labels(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Positions at least `gap` apart, as near to the sorted `wanted` ones as can be (least squares), within `height`.

    Where there are too many for the height they are spaced evenly. Neighbours that would collide are pooled and placed
    around their common mean (isotonic regression by pooling adjacent violators).
    """
    count = len(wanted)
    gap = min(gap, height / max(count - 1, 1))
    blocks: list[tuple[float, int]] = []  # sum of wanted positions less their offset in the stack, and count
    for i, y in enumerate(wanted):
        total, size = y - i * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / size:
            total, size = total + blocks[-1][0], size + blocks[-1][1]
            blocks.pop()
        blocks.append((total, size))
    base = [total / size for total, size in blocks for _ in range(size)]
    highest = height - (count - 1) * gap
    return [min(max(b, 0.0), highest) + i * gap for i, b in enumerate(base)]


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
    return style[1 if theme is DARK else 0], style[2]


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
