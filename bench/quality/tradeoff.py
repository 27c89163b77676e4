"""A picture of how bias and variance of estimators depend on the length of the window."""

from __future__ import annotations

from io import BytesIO
from typing import Any

STYLES = {
    "truncated, order 1": ("v", "#7fb8e0"),
    "truncated, order 2": ("^", "#1f5fa8"),
    "full, order 1": ("<", "#7fb8e0"),
    "full, order 2": (">", "#1f5fa8"),
    "es": ("s", "#8a8a8a"),
    "full_es": ("p", "#333333"),
    "pes": ("o", "#c0392b"),
    "nres": ("D", "#2e8b57"),
    "es_single": ("X", "#e08e0b"),
}
PANELS = {
    "bias": "bias: |mean - true| / |true|; hollow: no more than noise (bar: two standard errors)",
    "variance": "variance of an estimate x its inner steps / |true|$^2$",
}
APART = 2.0
"""Whole runs are drawn at this multiple of the horizon."""


def draw_tradeoff(results: list[dict[str, Any]], smoothing: float, horizon: int) -> bytes:
    """Bias and variance per inner step of every estimator against K, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((12, 6), dpi=110, layout="constrained")
    all_axes = figure.subplots(1, 2)
    windows = sorted({r["steps"] for r in results if not r["whole_runs"]})
    labels = list(dict.fromkeys(r["estimator"] for r in results))
    for axes, (key, title) in zip(all_axes, PANELS.items(), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([*windows, APART * horizon], [*map(str, windows), "whole\nrun"])
        axes.minorticks_off()
        axes.axvline(APART**0.5 * horizon, color="#bbbbbb", lw=0.8)
        for i, label in enumerate(labels):
            shift = 1.025 ** (i - len(labels) / 2)  # so that equal figures do not hide each other
            draw_line(axes, key, label, [r for r in results if r["estimator"] == label], horizon, shift)
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_xlabel(f"K, steps of a window (runs of {horizon} steps)")
        axes.grid(color="#e4e4e4", lw=0.6)
    all_axes[0].axhline(smoothing, color="black", lw=1, ls=":", label="smoothing by sigma")
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def draw_line(axes: Any, key: str, label: str, results: list[dict[str, Any]], horizon: int, shift: float) -> None:
    """One estimator in one panel, moved to the side by the factor `shift`."""
    mark, color = STYLES.get(label, ("*", "#7b3fa0"))
    steps = [shift * (APART * horizon if r["whole_runs"] else r["steps"]) for r in results]
    values = [r[key] for r in results]
    axes.plot(steps, values, color=color, lw=1.3, marker=mark, ms=6.5, label=label, zorder=3)
    if key != "bias":
        return
    for x, r in zip(steps, results, strict=True):
        low, high = max(r["bias"] - 2 * r["bias_error"], 0.3 * r["bias"]), r["bias"] + 2 * r["bias_error"]
        axes.plot([x, x], [low, high], color=color, lw=0.9)
        if r["bias_is_noise"]:
            axes.plot([x], [r["bias"]], color=color, lw=0, marker=mark, ms=6.5, mfc="white", zorder=4)
