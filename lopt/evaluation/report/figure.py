"""Figures of matplotlib's that a notebook shows by themselves, without pyplot and its state of the whole process."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lopt.evaluation.report.looks import RC


class Picture(Figure):
    """A figure that is its own PNG.

    Args:
        options: of `matplotlib.figure.Figure`.
    """

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        FigureCanvasAgg(self)

    def to_png(self) -> bytes:
        """The content of a PNG file, in the figure's own resolution and colours."""
        stream = BytesIO()
        with matplotlib.style.context(RC):
            FigureCanvasAgg(self).print_png(stream)
        return stream.getvalue()

    def _repr_png_(self) -> bytes:
        return self.to_png()
