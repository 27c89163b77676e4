"""One picture of a portfolio: what so many settings reach on a family that none of them was chosen on."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from lopt.evaluation.portfolio.greedy import LeftOut
from lopt.evaluation.statistics import find_interval

COLOURS = ("tab:green", "tab:blue", "tab:orange", "tab:purple")


def draw_left_out(found: Mapping[str, LeftOut], size: int) -> bytes:
    """The curves as a PNG.

    Args:
        found: by label, of the same families and random search.
        size: of the portfolio whose equal is marked.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    first = next(iter(found.values()))
    tried = range(1, first.random.shape[1] + 1)
    low, high = find_interval((first.random.numpy(),), np.mean)
    axes.fill_between(tried, low, high, color="0.5", alpha=0.2, linewidth=0)
    axes.plot(tried, first.random.mean(0), color="0.4", label="random search, each setting run to its end")
    for (label, own), colour in zip(found.items(), COLOURS, strict=False):
        counts = range(1, own.portfolio.shape[1] + 1)
        low, high = find_interval((own.portfolio.numpy(),), np.mean)
        axes.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(counts, own.portfolio.mean(0), color=colour, marker="o", label=f"{label}, each run to its end")
        axes.plot(counts, own.halved.mean(0), color=colour, marker="x", linestyle=":", label=f"{label}, by lopt.choose")
        equal, level = own.find_equal(size), float(own.portfolio[:, size - 1].mean())
        end = min(equal, len(tried))
        axes.plot([size, end], [level, level], color=colour, linestyle="--", linewidth=1)
        told = f"{size} = {equal} at random" if equal <= len(tried) else f"{size} > {len(tried)} at random"
        axes.annotate(told, (end, level), xytext=(-4, -5), textcoords="offset points", ha="right", va="top", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set(
        xlabel="settings tried",
        ylabel="progress that is missing\n(share of the best setting's, log loss)",
        title=f"Mean over {len(first.families)} families, each left out in its turn",
        xlim=(1, len(tried)),
        ylim=(0, None),
    )
    axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
