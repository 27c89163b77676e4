"""What is reached on measured molecules, and which descriptors a learned start goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from torch import Tensor

from lopt.evaluation.statistics import summarize

SHOWN = 14
"""Descriptors with the largest scales."""


def draw_properties(
    scores: Mapping[str, Mapping[str, Tensor]], scales: Tensor, names: Sequence[str], shots: int, *, dpi: int = 160
) -> bytes:
    """A PNG: coefficients of determination with 95 % intervals over draws, by set and row, and the largest scales.

    Args:
        scores: of every draw `[D]`, by set and row.
        scales: of the inputs.
        names: of these.
        shots: labels that were known.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2, 1]})
    labels = list(next(iter(scores.values())))
    for i, label in enumerate(labels):
        found = [summarize(rows[label].tolist()) for rows in scores.values()]
        heights, errors = ([getattr(s, key) or 0.0 for s in found] for key in ("mean", "stderr"))
        places = np.arange(len(scores)) + 0.8 * (i / len(labels) - 0.5)
        left.bar(places, heights, 0.8 / len(labels), yerr=[1.96 * e for e in errors], label=label, error_kw={"lw": 0.8})
    left.set_xticks(range(len(scores)), list(scores))
    left.set_ylabel(f"R2 from {shots} labels")
    left.set_ylim(0, 1.1)  # room for the legend
    left.legend(fontsize=6.5, loc="upper right")
    largest = scales.abs().argsort(descending=True)[:SHOWN].flip(0).tolist()
    right.barh([names[i] for i in largest], [float(scales[i].abs()) for i in largest])
    right.tick_params(axis="y", labelsize=7)
    right.set_xlabel("learned scale")
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()
