"""The picture of `bench robustness`: for each axis a panel of training losses above one of validation losses."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.quality.departures import Axis
from lopt.evaluation.behaviour.panels import name_curves
from lopt.evaluation.report.looks import DEFAULT_STYLE, LIGHT, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.quality.robustness import Point

COLUMNS, INCHES = 5, (2.0, 3.05)  # panels side by side; width and height of one with both figures
HEAD = 0.95  # inches above the panels
SHADES = 64  # of the picture's colours
NARROWEST = 7.4  # inches, for the words above
LOOKS: tuple[tuple[str, Any, float], ...] = (
    (LIGHT.subject, "-", 2.2),
    ("#eb9a4d", "-", 1.4),
    (DEFAULT_STYLE[0], DEFAULT_STYLE[2], 1.2),
    (STYLES["adam"][0], "-", 1.4),
)
"""Colour, dashes and width of each contender."""
REACH = {"train_ratio": (1e-3, 1e3), "validation_ratio": (0.1, 30.0)}
"""What is drawn at most; what is beyond sits on the edge as a triangle."""


def draw_multiples(points: Sequence[Point], axes: dict[str, Axis], titles: Sequence[str], *, dpi: int = 100) -> bytes:
    """A PNG.

    Args:
        points: of all contenders at all settings.
        titles: of the contenders, the rule first and the one whose loss is 1 last.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from PIL import Image

    places = find_places(axes)
    rows, columns = (1 + max(numbers) for numbers in zip(*places, strict=True))
    width, height = max(NARROWEST, INCHES[0] * columns + 0.4), INCHES[1] * rows + HEAD
    with matplotlib.style.context(["default", {"font.sans-serif": ["DejaVu Sans"], "font.size": 8}]):
        layout = ConstrainedLayoutEngine(h_pad=0.06, rect=(0, 0, 1, 1 - HEAD / height))
        figure = Figure((width, height), dpi=dpi, facecolor=LIGHT.background, layout=layout)
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 2] * rows)
        for (name, axis), (row, column) in zip(axes.items(), places, strict=True):
            alike = [point for point in points if axes[point.axis].model == axis.model]
            own = [point for point in points if point.axis == name]
            for j, key in enumerate(REACH):
                panel = figure.add_subplot(grid[2 * row + j, column])
                draw_panel(panel, own, axis, key, titles, find_limits(alike, key))
                panel.set_ylabel(("training", "validation")[j] if column == 0 else "", color=LIGHT.text)
                panel.set_title(axis.title if j == 0 else "", color=LIGHT.text, size=8.5, weight="bold")
                panel.tick_params(labelleft=column == 0, labelbottom=j == 1)
        words: dict[str, Any] = {"va": "top", "x": 0.12 / width}
        figure.text(y=1 - 0.1 / height, s=f"Robustness: {titles[0]}", color=LIGHT.text, weight="bold", size=11, **words)
        caption = (
            f"Final losses over those of {titles[-1]} at the usual setting (vertical line; log scales), lower is "
            "better. Triangles: beyond the panel, or not finite."
        )
        caption = fill(caption, int(16 * width))
        figure.text(y=1 - 0.5 / height, s=caption, linespacing=1.3, color=LIGHT.faint, size=8, **words)
        name_curves(figure, [(title, look[0]) for title, look in zip(titles, LOOKS, strict=True)])
        canvas, stream = FigureCanvasAgg(figure), BytesIO()
        canvas.draw()
        # A few hues and their shades: a palette takes half of the bytes.
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(SHADES).save(stream, "png")
    return stream.getvalue()


def find_places(axes: dict[str, Axis]) -> list[tuple[int, int]]:
    """Row and column of each axis; another model begins another row, as its panels have other limits."""
    row, column, places = 0, -1, []
    models = [axis.model for axis in axes.values()]
    for model, before in zip(models, [models[0], *models], strict=False):
        row, column = (row + 1, 0) if model != before or column == COLUMNS - 1 else (row, column + 1)
        places.append((row, column))
    return places


def find_limits(points: Sequence[Point], key: str) -> tuple[float, float]:
    """The same for all panels of a model: what there is, with some room, within `REACH`."""
    low, high = REACH[key]
    values = [value for point in points if (value := getattr(point, key)) is not None]
    return max(low, min([*values, 0.5]) / 1.3), min(high, max([*values, 2.0]) * 1.3)


def draw_panel(
    panel: Axes, points: Sequence[Point], axis: Axis, key: str, titles: Sequence[str], limits: tuple[float, float]
) -> None:
    """The lines of all contenders along one axis, one of the two losses, into empty axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = limits
    places = range(len(axis.values))
    panel.axhline(1, color=LIGHT.faint, lw=0.7)
    panel.axvline(axis.values.index(getattr(axis.base, axis.trait)), color=LIGHT.grid, lw=2.5, zorder=0)
    # The rule is drawn last, on top of the others.
    for rank, (title, (color, dashes, width)) in enumerate(list(zip(titles, LOOKS, strict=True))[::-1]):
        values = [getattr(point, key) for point in points if point.contender == title]
        shown = [high if value is None else min(max(value, low), high) for value in values]
        panel.plot(places, shown, color=color, ls=dashes, lw=width, zorder=3 + rank)
        for place, value, at in zip(places, values, shown, strict=True):
            mark = "o" if value == at else "^" if at == high else "v"
            size = 2.6 if mark == "o" else 6
            panel.plot([place], [at], color=color, marker=mark, ms=size, zorder=3 + rank, clip_on=False)
    panel.set(yscale="log", ylim=limits, xlim=(-0.3, len(axis.values) - 0.7))
    panel.set_xticks(list(places), [f"{v:g}" if isinstance(v, float | int) else v for v in axis.values])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=5))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(axis="y", color=LIGHT.grid, lw=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(LIGHT.faint)
    panel.tick_params(colors=LIGHT.faint, labelcolor=LIGHT.text, length=2)
    panel.tick_params(axis="y", length=0)
