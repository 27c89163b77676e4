"""A picture of how near kernels come to the speed of memory."""

from __future__ import annotations

from io import BytesIO
from typing import Any

MARKS = {"reference": ("o", "#8a8a8a"), "compiled": ("s", "#3b6fb6"), "triton": ("^", "#c0392b")}


def draw_roofline(results: list[dict[str, Any]], bandwidth: float, device: str) -> bytes:
    """Bytes per parameter against GB/s of each kernel and way, and the speed of a copy as a line, as a PNG.

    The bytes are those that the formula has to move: a way that moves more is lower. What was interpreted is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(bandwidth / 1e9, color="black", lw=1)
    axes.annotate(
        f"copy, measured: {bandwidth / 1e9:.3g} GB/s",
        (0.01, bandwidth / 1e9),
        (0, 3),
        ("axes fraction", "data"),
        "offset points",
        fontsize=8,
    )
    for way, (mark, color) in MARKS.items():
        points = [(r["bytes_per_parameter"], r["ways"][way], r) for r in results if is_drawn(r, way)]
        if points:
            rates = [found["gb_per_second"] for _, found, _ in points]
            label = {"reference": "reference, eager", "compiled": "reference, torch.compile"}.get(way, "Triton kernel")
            axes.scatter([x for x, _, _ in points], rates, marker=mark, c=color, s=28, label=label, zorder=3)
    for r in results:
        best = max((r["ways"][way]["gb_per_second"] for way in MARKS if is_drawn(r, way)), default=None)
        if best is not None:
            name = r["kernel"] if r["state_dtype"] == "float32" else f"{r['kernel']}, {r['state_dtype']}"
            axes.annotate(name, (r["bytes_per_parameter"], best), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.15)  # for the names
    left_out = any("note" in found for r in results for found in r["ways"].values())
    axes.set_xlabel("bytes per parameter that the formula has to move")
    axes.set_ylabel("GB/s")
    axes.set_title(device + (" (Triton was interpreted: not drawn)" if left_out else ""), fontsize=9, loc="left")
    axes.grid(color="#dddddd", lw=0.6, zorder=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def is_drawn(result: dict[str, Any], way: str) -> bool:
    """There is a speed that means something."""
    return result["ways"].get(way, {}).get("gb_per_second") is not None
