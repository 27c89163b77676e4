"""The frame of a picture with panels side by side: title, caption, axes in the house style, labels, limits.

Every picture of a rule is made of these, so that they look alike and can be read beside each other. All lengths are in
inches; colours come from a `lopt.evaluation.report.curves.Theme`.
"""

from __future__ import annotations

import textwrap
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt.evaluation.report.looks import Theme, spread_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (7.4, 3.0)  # width of a picture, height of its axes
TOP, BOTTOM = 0.72, 1.12  # above and below the axes
SHADES = ("#4b1d0e", "#d03800", "#f2a65a")
WIDTHS = (4.2, 2.6, 1.1)
LEAST_SPAN = 100.0
"""A logarithmic axis shows at least this ratio, so that a flat curve looks flat."""


def start_figure(
    label: str,
    theme: Theme,
    title: str,
    subtitle: str,
    caption: str,
    *,
    columns: int = 1,
    margins: tuple[float, float],
    gap: float = 0.2,
    height: float = INCHES[1],
    top: float = TOP,
) -> tuple[Figure, list[Axes]]:
    """A figure with its words and empty axes side by side, ready to be drawn into.

    Args:
        label: of the rule, shortened to 30 characters behind the title.
        subtitle: what to look for.
        caption: how the rule was probed; wrapped below the axes.
        columns: how many axes.
        margins: left and right of them; with `gap`, `height` and `top` in inches.
    Returns:
        The figure, whose canvas the caller chooses, and the axes from left to right.
    """
    from matplotlib.figure import Figure

    width, total = INCHES[0], top + height + BOTTOM
    figure = Figure((width, total), facecolor=theme.background)

    # Words are placed in inches from the edges, so that they stay where they are if the height changes.
    def write(y: float, text: str, **look: Any) -> None:
        figure.text(0.12 / width, y / total, text, va="top", **look)

    write(
        total - 0.12,
        f"{title}: {textwrap.shorten(label, 30, placeholder='...')}",
        color=theme.text,
        weight="bold",
        size=11,
    )
    write(total - 0.36, subtitle, color=theme.faint, size=8)
    write(0.56, textwrap.fill(caption, 140), color=theme.faint, size=7, linespacing=1.25)
    # The house style: two faint axes in place of a frame, and a grid behind the curves.
    each = (width - sum(margins) - gap * (columns - 1)) / columns
    panels = []
    for i in range(columns):
        left = margins[0] + i * (each + gap)
        axes = figure.add_axes((left / width, BOTTOM / total, each / width, height / total))
        axes.set_facecolor(theme.background)
        axes.grid(color=theme.grid, lw=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            axes.spines[side].set_color(theme.faint)
        axes.tick_params(which="both", colors=theme.faint, labelcolor=theme.text, length=3)
        panels.append(axes)
    return figure, panels


def draw_colorbar(figure: Figure, image: Any, theme: Theme) -> None:
    """The scale of a map's colours, at the right of the last panel: from a full step that raises the parameter (-1)
    over none to a full step that lowers it (1).
    """
    box = figure.axes[-1].get_position()
    axes = figure.add_axes((box.x1 + 0.02, box.y0, 0.016, box.height))
    bar = figure.colorbar(image, cax=axes, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    axes.tick_params(colors=theme.faint, labelcolor=theme.text, length=0)
    axes.set_ylabel("step \u2212Δp / full step", color=theme.text)


def label_ends(axes: Axes, anchors: list[tuple[float, str, str]]) -> None:
    """Names of curves right of the axes, joined to their ends by lines and moved apart where they would overlap: no
    legend, which readers would have to match by colour.

    Args:
        anchors: for each curve where it ends, as a share of the axes' height (anything that is not finite is at the
            top), its name and its colour.
    """
    within = [(min(max(share, 0.0), 1.0) if isfinite(share) else 1.0, text, color) for share, text, color in anchors]
    anchors = sorted(within, key=lambda anchor: anchor[0])
    places = spread_labels([share for share, _, _ in anchors], 0.062, 1.0)
    for (share, text, color), place in zip(anchors, places, strict=True):
        axes.plot([1.01, 1.03, 1.05], [share, place, place], transform=axes.transAxes, color=color, lw=1, clip_on=False)
        axes.text(1.06, place, text, transform=axes.transAxes, color=color, va="center_baseline", size=8)


def name_curves(figure: Figure, names: list[tuple[str, str]]) -> None:
    """A legend beside the subtitle, where no curve is, for pictures in which the same curves are in every panel.

    Args:
        names: and colours; names are shortened to 18 characters.
    """
    from matplotlib.lines import Line2D

    shortened = [(textwrap.shorten(name, 18, placeholder="..."), color) for name, color in names]
    handles = [Line2D([], [], color=color, lw=2, label=name) for name, color in shortened]
    place = (1.0, 1 - 0.25 / figure.get_size_inches()[1])
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=place,
        ncols=len(handles),
        fontsize=8,
        labelcolor="linecolor",
        frameon=False,
        handlelength=1.4,
    )


def shade_scale(i: int) -> tuple[str, float]:
    """Colour and width of the curve of a scale: from dark to light with the scale, for those who see no colours, and
    thinner the later it is drawn, so that none hides another.

    Args:
        i: index of the scale, the smallest first.
    """
    return SHADES[i % 3], WIDTHS[i % 3]


def find_limits(curves: list[Tensor]) -> tuple[float, float]:
    """Limits of a logarithmic axis that shows all curves, with some space around them and at least a ratio of
    `LEAST_SPAN`.

    Args:
        curves: of either sign; zeros and what is not finite are ignored.
    """
    sizes = torch.cat(curves).abs()
    sizes = sizes[sizes.isfinite() & (sizes > 0)]
    if not len(sizes):
        return 1e-4, 1.0
    low, high = sizes.min().item(), sizes.max().item()
    spare = max(1.5, (LEAST_SPAN * low / high) ** 0.5)
    return low / spare, high * spare


def locate(value: Tensor, limits: tuple[float, float]) -> float:
    """Where a value is on a logarithmic axis, as a share of its length in [0, 1], for labels at the ends of curves;
    values beyond the limits are at the end.
    """
    low, high = torch.tensor(limits, dtype=torch.float32).log()
    return torch.nan_to_num((value.log() - low) / (high - low)).clamp(0, 1).item()


def find_largest(steps: Tensor) -> float:
    """The largest size of some steps of either sign, those that are not finite left out, or 0: curves are drawn as
    shares of it.
    """
    return torch.nan_to_num(steps.abs(), nan=0.0, posinf=0.0).max().item()


def measure_size(steps: Tensor) -> float:
    """Root mean square of some steps, of any shape: the size at which Adam's learning rate is chosen, so that two
    optimizers are compared by the shape of their response.
    """
    return steps.square().mean().sqrt().item()


def format_short(value: float) -> str:
    """Two significant digits: figures in titles are there for their order of magnitude."""
    return f"{value:.2g}"
