"""What tracking looks like: the loss around the flip of a sign, and along a stream."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import torch
from torch import Tensor

from lopt.evaluation.streams.prequential import average_phases

WINDOW = 200
"""Steps that the curve along the stream is averaged over."""


def draw_tracking(losses: Mapping[str, Tensor], period: int, burn_in: int, *, dpi: int = 160) -> bytes:
    """A PNG: mean loss by the steps from a flip, behind the burn-in, and along the whole stream.

    Args:
        losses: `[N, T]` by what is written beside a curve.
        period: steps from one flip to the next.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    before = period // 4
    left.axvline(-0.5, color="black", lw=0.8, ls="--")
    for label, values in losses.items():
        phases = average_phases(values, period, burn_in).roll(before)  # the last ones are those before the next flip
        left.plot(range(-before, period - before), phases.tolist(), marker=".", label=label)
        count = len(values) // WINDOW
        along = values[: count * WINDOW].double().view(count, -1).mean(1)
        right.plot((WINDOW * (torch.arange(count) + 0.5)).tolist(), along.tolist(), label=label)
    left.set_title("around the flip of a sign", fontsize=10)
    left.set_xlabel("examples since the flip")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("squared error of the next example")
    right.set_title(f"along the stream, means of {WINDOW}", fontsize=10)
    right.set_xlabel("examples")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()
