"""What all pictures have in common: colours, dashes, plain axes, and names at the ends of curves in place of a legend.

Colours are Okabe & Ito's (safe for colour-blind readers) or shades of them; optimizers of one family share a hue and
differ by dashes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_GAP = 11.5
"""Distance of neighbouring labels in points."""
RC: list[Any] = ["default", {"font.sans-serif": ["DejaVu Sans"], "font.size": 9}]
"""Of `matplotlib.style.context`: nothing of the user's matplotlib has an effect here."""


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


class Label(NamedTuple):
    """What stands at the end of a curve.

    Attributes:
        name: of the optimizer.
        value: the number beside it, by which labels are ordered; None where it diverged.
        end: where the curve ends; None above the picture.
        color, dashes: of the curve.
        bold: it is what the picture is about.
    """

    name: str
    value: float | None
    end: float | None
    color: str
    dashes: Any
    bold: bool


def pick_style(style: Style, theme: Theme) -> tuple[str, Any]:
    """Colour and dashes on a page of this kind."""
    return style[1 if theme is DARK else 0], style[2]


def dress_axes(axes: Axes, theme: Theme) -> None:
    """A grid behind the curves, no frame but a line at the foot, ticks that are read second."""
    axes.set_facecolor(theme.background)
    axes.grid(axis="y", color=theme.grid, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, length=3)
    axes.tick_params(axis="y", which="both", length=0)


def set_log_scale(axes: Axes, limits: tuple[float, float]) -> None:
    """A logarithmic axis of losses, with plain numbers at its ticks, as losses are no powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(*limits)
    narrow = limits[1] < 20 * limits[0]  # which has one power of ten, or none
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=tuple(range(2, 10)), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, labels: Sequence[Label], *, height: float, value_at: float, longest: int = 18) -> None:
    """Names and numbers to the right of the axes, in the order of the numbers, each as near as can be to the end of its
    curve, to which a line of the curve's own kind leads.

    Args:
        axes: with their limits, on a logarithmic scale.
        height: of the axes in inches.
        value_at: right edge of the numbers in widths of the axes.
        longest: characters of a name.
    """
    bottom, top = axes.get_ylim()
    points = 72 * height

    def find_end(label: Label) -> float:
        shown = top if label.end is None else min(max(label.end, bottom), top)
        return points * log10(shown / bottom) / log10(top / bottom)

    ranked = sorted(labels, key=lambda label: (float("inf") if label.value is None else label.value, find_end(label)))
    ends = [find_end(label) for label in ranked]
    for label, end, place in zip(ranked, ends, spread_labels(ends, LABEL_GAP, points), strict=True):
        axes.plot(
            [1.01, 1.04, 1.07],
            [end / points, place / points, place / points],
            transform=axes.transAxes,
            color=label.color,
            ls=label.dashes,
            lw=2.5 if label.bold else 1.1,
            clip_on=False,
        )
        look: dict[str, Any] = {"transform": axes.transAxes, "color": label.color, "va": "center_baseline"}
        look |= {"size": 8.5, "weight": "bold"} if label.bold else {"size": 8}
        axes.text(1.085, place / points, textwrap.shorten(label.name, longest, placeholder="..."), **look)
        text = "diverged" if label.value is None else f"{label.value:#.3g}"
        axes.text(value_at, place / points, text, ha="right", **look)


def spread_labels(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Positions in the order of the `wanted` ones and at least `gap` apart, as near to these as can be (least squares),
    within `height`.

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
