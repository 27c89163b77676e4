"""The picture of `bench families`: how rules got better while they were trained, and where each family ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lopt.evaluation.report.looks import DEFAULT_STYLE, LIGHT, OTHER_STYLES, RC, STYLES, dress_axes, spread_labels
from lopt.evaluation.results import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (LIGHT.subject, STYLES["nesterov"][0], STYLES["adam"][0], STYLES["rmsprop"][0])
WIDTH, ROW, TOP, BOTTOM = 11.0, 0.28, 1.0, 0.95  # inches
FLOOR, CEILING = 1e-3, 1e3  # of the ratios that are drawn; what is beyond is an arrow on the edge
GAP = 12.0  # points between labels

Curve = list[tuple[float, float]]
"""Minutes of training, and the figure on held-out tasks."""


def read_curve(metrics: list[dict[str, Any]], figure: str = "final") -> Curve:
    """What a run's validations found, against the time that its outer steps took (validations not counted)."""
    seconds, curve = 0.0, []
    for line in metrics:
        if line["kind"] == "train":
            seconds += line["inner_steps"] / line["inner_steps_per_second"]
        if line["kind"] == "validation" and line[figure] is not None:
            curve.append((seconds / 60, line[figure]))
    return curve


def draw_field(curves: Mapping[str, Curve], means: Mapping[str, Mapping[str, float]], reference: str) -> bytes:
    """A PNG.

    Args:
        curves: of each rule.
        means: per family the mean final loss of every optimizer.
        reference: the optimizer whose loss is 1 on the right.
    """
    import matplotlib.style

    from lopt.evaluation.report.figure import Picture

    height = TOP + ROW * len(means) + BOTTOM
    with matplotlib.style.context(RC):
        figure = Picture((WIDTH, height), dpi=110, facecolor=LIGHT.background)
        place = {"bottom": BOTTOM / height, "height": ROW * len(means) / height}
        left = figure.add_axes((0.06, place["bottom"], 0.24, place["height"]))
        right = figure.add_axes((0.52, place["bottom"], 0.46, place["height"]))
        _draw_training(left, curves, ROW * len(means))
        _draw_ratios(right, means, reference, list(curves))
        _write(left, 0.55, "Meta-training", "mean log(final loss / first loss), held-out tasks; lower is better")
        _write(right, 0.55, "Held-out tasks of every family", f"final loss / that of {reference}; left is better")
    return figure.to_png()


def _draw_training(axes: Axes, curves: Mapping[str, Curve], height: float) -> None:
    dress_axes(axes, LIGHT)
    for colour, curve in zip(COLOURS, curves.values(), strict=False):
        axes.plot(*zip(*curve, strict=True), color=colour, lw=1.8)
    axes.set_xlabel("minutes of meta-training", color=LIGHT.text)
    axes.set_xlim(left=0)
    # Names at the ends of the curves, in the order of what they came to.
    bottom, top = axes.get_ylim()
    ends = sorted(
        (curve[-1][1], label, colour) for colour, (label, curve) in zip(COLOURS, curves.items(), strict=False)
    )
    heights = [72 * height * (end - bottom) / (top - bottom) for end, _, _ in ends]
    for (end, label, colour), y in zip(ends, spread_labels(heights, GAP, 72 * height), strict=True):
        look: dict[str, Any] = {"transform": axes.transAxes, "color": colour, "va": "center", "size": 8}
        axes.text(1.03, y / (72 * height), f"{label}  {end:.3g}", **look)


def _draw_ratios(axes: Axes, means: Mapping[str, Mapping[str, float]], reference: str, rules: list[str]) -> None:
    """A row for each family, a mark for each optimizer: filled for rules, hollow before training, a stroke for others.

    What lies beyond the axis, or diverged, is an arrow on its edge.
    """
    dress_axes(axes, LIGHT)
    axes.set_xscale("log")
    axes.set_xlim(FLOOR / 1.6, CEILING * 1.6)
    axes.set_ylim(len(means) - 0.5, -0.5)
    axes.set_yticks(range(len(means)), list(means))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LIGHT.grid, lw=0.8)
    axes.tick_params(axis="x", which="minor", length=0)
    axes.axvline(1, color=LIGHT.faint, lw=1)
    others = iter([DEFAULT_STYLE[0], OTHER_STYLES[0][0]])
    labels = [name for name in next(iter(means.values())) if name != reference]
    for name in labels:
        base = name.removesuffix(", untrained")
        colour = dict(zip(rules, COLOURS, strict=False))[base] if base in rules else next(others)
        marker = "o" if base in rules else "|"
        fill = {"markerfacecolor": "none" if name != base else colour, "markersize": 6, "markeredgewidth": 1.3}
        for row, losses in enumerate(means.values()):
            ratio = losses[name] / losses[reference]
            ratio = CEILING * 2 if math.isnan(ratio) else ratio
            arrow = "<" if ratio < FLOOR else ">" if ratio > CEILING else marker
            axes.plot(min(CEILING, max(FLOOR, ratio)), row, arrow, color=colour, **fill, clip_on=False)
        axes.plot([], [], marker, color=colour, label=display_name(name), **fill)
    axes.plot([], [], "<", color=LIGHT.faint, markerfacecolor="none", label="arrows: beyond the edge, or diverged")
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.07), "ncols": 3}
    axes.legend(frameon=False, fontsize=7.5, labelcolor=LIGHT.text, handletextpad=0.3, columnspacing=1.2, **place)


def _write(axes: Axes, above: float, title: str, subtitle: str) -> None:
    """A title and what is shown, `above` inches over the axes."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    looks: list[dict[str, Any]] = [
        {"weight": "bold", "size": 10, "color": LIGHT.text},
        {"size": 7.5, "color": LIGHT.faint},
    ]
    for inches, text, look in zip((above, above - 0.25), (title, subtitle), looks, strict=True):
        up = axes.transAxes + ScaledTranslation(0, inches, figure.dpi_scale_trans)
        axes.text(0, 1, text, transform=up, **look)
