"""The picture of `bench families`: how rules got better while they were trained, and where each family ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO
from itertools import cycle
from typing import Any

from lopt.evaluation.report.curves import LIGHT

COLOURS = ("#d03800", "#0072b2", "#007f5f", "#a8447f")
SIZE = (11.0, 4.6)  # inches
FLOOR, CEILING = 1e-3, 1e3  # of the ratios that are drawn; what is beyond sits on the edge

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for colour, (label, curve) in zip(COLOURS, curves.items(), strict=False):
        left.plot(*zip(*curve, strict=True), color=colour, label=label, linewidth=1.8)
    left.set(xlabel="minutes of meta-training", ylabel="mean log(final loss / first loss), held-out tasks")
    left.set_title("Meta-training", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    left.grid(color=LIGHT.grid)

    places = range(len(means))
    markers = cycle("x+")
    others = [name for name in next(iter(means.values())) if name != reference]
    for name in others:
        base = name.removesuffix(", untrained")
        colour = dict(zip(curves, COLOURS, strict=False)).get(base, LIGHT.faint)
        ratios = [min(CEILING, max(FLOOR, losses[name] / losses[reference])) for losses in means.values()]
        ratios = [CEILING if math.isnan(ratio) else ratio for ratio in ratios]
        hollow, trained = name != base, base in curves
        marker = "o" if trained else next(markers)
        look: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": "none", "label": name}
        right.plot(ratios, places, markerfacecolor="none" if hollow else colour, markersize=6, **look)
    right.axvline(1, color=LIGHT.text, linewidth=1)
    right.set(xscale="log", yticks=list(places), yticklabels=list(means))
    right.set_xlabel(f"final loss / that of {reference} (left is better)")
    right.set_title("Held-out tasks of every family", loc="left", fontsize=10)
    right.invert_yaxis()
    right.grid(axis="x", color=LIGHT.grid)
    right.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
