"""The pictures of what a rule does: its probes drawn, each with a caption that says how it was probed.

Colours are Okabe & Ito's (safe for colour-blind readers) or shades of them; where colour stands for a scale, it also
goes from dark to light. Adam is grey. Figures are built without pyplot, so nothing of the user's matplotlib is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt.core.files import write_atomic
from lopt.evaluation.behaviour import probes
from lopt.evaluation.behaviour.panels import (
    draw_colorbar,
    find_largest,
    find_limits,
    format_short,
    label_ends,
    locate,
    measure_size,
    name_curves,
    shade_scale,
    start_figure,
)
from lopt.evaluation.behaviour.probes import DRAWS, SIZES, Portrait
from lopt.evaluation.report.looks import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
GREY = "#8c959f"
FULL = 0.98
"""Share of a map's steps that its colours tell apart; a rule may take one huge step where all gradients are 0."""


def write_portrait(folder: str | os.PathLike[str], portrait: Portrait) -> dict[str, Path]:
    """Draw all pictures of a rule and write them as PNG files into a folder.

    Args:
        folder: exists; pictures of the same names are replaced.
    Returns:
        The paths by file name, such as "gradient.png".
    Raises:
        ImportError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    target = Path(folder)
    return {name: write_atomic(target / name, data) for name, data in draw_portrait(portrait).items()}


def draw_portrait(portrait: Portrait, *, dpi: int = 160) -> dict[str, bytes]:
    """The pictures of a rule, for a folder or a page.

    Args:
        dpi: of the pictures, which are 7.4 inches wide.
    Returns:
        PNG data by file name.
    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pictures = {}
    with matplotlib.style.context(["default", {"font.sans-serif": ["DejaVu Sans"], "font.size": 8.5}]):
        for name, draw in PICTURES.items():
            stream = BytesIO()
            figure = draw(portrait, LIGHT)
            figure.set_dpi(dpi)
            FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
            pictures[f"{name}.png"] = stream.getvalue()
    return pictures


# -- pictures ----------------------------------------------------------------------------------------------------------


def draw_gradient(portrait: Portrait, theme: Theme) -> Figure:
    """Size of the step against size of the gradient, by what came before: shows whether a rule follows the size of
    gradients (a diagonal, as SGD), ignores it (flat, as Adam), or how much momentum outweighs the present.
    """
    steady = portrait.gradient[probes.PASTS[0]]
    figure, (axes,) = start_figure(
        portrait.label,
        theme,
        "Step against gradient",
        _describe_growth(steady),
        f"Before the step at the gradient g: {probes.HISTORY} steps at +g (the same), +-g in turn or -g (opposite), or "
        "none. Thick: the step goes with the present gradient; thin: against it, carried by the past. Faint diagonals: "
        "steps proportional to the gradient, as plain SGD's." + _describe_neighbours(portrait, "g"),
        margins=(0.72, 2.1),
    )
    limits = find_limits(list(portrait.gradient.values()))
    # Both axes are logarithmic, so that powers of the gradient are lines; the faint ones have slope 1.
    axes.set(xscale="log", yscale="log", xlim=SIZES[[0, -1]].tolist(), ylim=limits)
    axes.grid(False)
    for decade in range(-40, 41, 2):
        ends = SIZES[[0, -1]].double().numpy()
        axes.plot(ends, ends * 10.0**decade * limits[0], color=theme.grid, lw=0.9, zorder=0)
    # A curve in two parts: where the step goes against the present gradient it is drawn thinner, not left out.
    looks: list[tuple[str, Any]] = [
        (theme.subject, "-"),
        (BLUE, (0, (5, 1.5))),
        (GREEN, (0, (3, 3))),
        (theme.text, (0, (1, 3))),
    ]
    anchors = []
    for (past, steps), (color, dashes) in zip(portrait.gradient.items(), looks, strict=True):
        for sign, width in ((1, 2.2), (-1, 0.9)):
            kept = torch.where(sign * steps > 0, steps.abs(), torch.nan)
            axes.plot(SIZES.numpy(), kept.numpy(), color=color, ls=dashes, lw=width, solid_capstyle="round")
        anchors.append((locate(steps[-1].abs(), limits), past, color))
    label_ends(axes, anchors)
    axes.set_xlabel("gradient |g|", color=theme.text)
    axes.set_ylabel("step |Δp|", color=theme.text)
    return figure


def draw_map(portrait: Portrait, theme: Theme) -> Figure:
    """The step over present and past gradient, a panel for each scale: the direction of the boundary where the step is
    zero shows how much of the past a rule carries on.
    """
    from matplotlib.colors import LinearSegmentedColormap

    probed = portrait.map
    reach = probes.REACH
    neighbours = (
        ""
        if portrait.elementwise
        else (
            " This rule looks at whole tensors: the points of a panel are the entries of one matrix, in arbitrary "
            "order, averaged over 8 of them."
        )
    )
    figure, panels = start_figure(
        portrait.label,
        theme,
        "Step over the present gradient and the past ones",
        "Vertical boundary: only the present counts. Horizontal: only the past. Slanted: momentum.",
        f"The past is the same gradient for {probes.HISTORY} steps. Orange: p is lowered, as a positive gradient asks; "
        "blue: p is raised; thick line: no step; thin lines: 25, 50 and 75 % of a full step, than which 98 % of the "
        "panel's steps are smaller." + neighbours,
        columns=len(probed.scales),
        margins=(0.72, 1.0),
        height=2.1,
        top=1.0,
    )
    colormap = LinearSegmentedColormap.from_list("steps", [BLUE, "#a9cfe6", "#fbfbfb", "#f5bd92", ORANGE])
    for i, (axes, scale, steps) in enumerate(zip(panels, probed.scales, probed.steps, strict=True)):
        # Every panel has its own unit: how large the steps are is written above it, how they turn is in the colours.
        full = torch.nan_to_num(steps.abs()).quantile(FULL).item()
        share = torch.nan_to_num(steps / (full or 1.0)).clamp(-2, 2).numpy()
        edges = (-reach, reach)
        image = axes.imshow(share, cmap=colormap, vmin=-1, vmax=1, origin="lower", extent=edges * 2, aspect="auto")
        levels = [-0.75, -0.5, -0.25, 0.25, 0.5, 0.75]
        # Contours of an all-zero map would warn and show nothing.
        if share.any():
            grid = probed.axis.numpy()
            axes.contour(grid, grid, share, levels, colors="#1f2328", linewidths=0.35, linestyles="-")
            axes.contour(grid, grid, share, [0.0], colors="#1f2328", linewidths=1.5)
        axes.grid(False)
        axes.set_xticks([-2, 0, 2])
        axes.set_yticks([-2, 0, 2])
        if i:
            axes.set_yticklabels([])
        axes.set_title(f"in units of {scale:g}\nfull step {format_short(full)}", color=theme.text, size=8)
        axes.set_xlabel("present gradient", color=theme.text)
    panels[0].set_ylabel("past gradient", color=theme.text)
    draw_colorbar(figure, image, theme)
    return figure


def draw_jump(portrait: Portrait, theme: Theme) -> Figure:
    """Steps over time while the gradient is noise, then constant, then its opposite: shows how fast a rule answers to a
    change, beside Adam with a learning rate that makes its steps as large.
    """
    probed = portrait.jump
    figure, panels = start_figure(
        portrait.label,
        theme,
        "Response to a jump in the gradient",
        "First noise around 0, then a constant gradient, then its opposite.",
        f"Lines: medians of {DRAWS} draws of the noise; bands: their quartiles. Adam (grey, default momenta) has the "
        "learning rate that makes its root mean square step that of the rule; steps are in units of it."
        + _describe_neighbours(portrait, "its scale"),
        columns=len(probed.scales),
        margins=(0.72, 0.25),
        gap=0.25,
        top=1.25,
    )
    num_steps = sum(probes.PHASES)
    time = range(num_steps)
    for i, (axes, scale, ours, adam) in enumerate(
        zip(panels, probed.scales, probed.steps, portrait.adam.steps, strict=True)
    ):
        # Adam gets the learning rate at which its steps are as large, so that only the shapes differ.
        lr = measure_size(ours) / measure_size(adam)
        for steps, color, width in ((adam, GREY, 1.5), (ours / (lr or 1.0), theme.subject, 2.0)):
            low, middle, high = steps.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float32), dim=0).numpy()
            axes.fill_between(time, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(time, middle, color=color, lw=width, solid_capstyle="round")
        for edge in (probes.PHASES[0], sum(probes.PHASES[:2])):
            axes.axvline(edge, color=theme.faint, lw=0.8, ls=(0, (2, 2)))
        axes.axhline(0, color=theme.faint, lw=0.8)
        axes.set_xlim(0, num_steps - 1)
        centers = (probes.PHASES[0] / 2, probes.PHASES[0] + probes.PHASES[1] / 2, num_steps - probes.PHASES[2] / 2)
        for x, text in zip(centers, ("noise", f"+{scale:g}", f"\u2212{scale:g}"), strict=True):
            axes.text(x, 1.02, text, transform=axes.get_xaxis_transform(), ha="center", size=7.5, color=theme.faint)
        axes.set_title(f"gradient of scale {scale:g}\nAdam's lr {format_short(lr)}\n", color=theme.text, size=8)
        axes.set_xlabel("step", color=theme.text)
        if i:
            axes.set_yticklabels([])
    # One scale for all panels: they are in the same unit.
    limits = [min(a.get_ylim()[0] for a in panels), max(a.get_ylim()[1] for a in panels)]
    for axes in panels:
        axes.set_ylim(*limits)
    panels[0].set_ylabel("step \u2212Δp / Adam's lr", color=theme.text)
    name_curves(figure, [(portrait.label, theme.subject), ("Adam", GREY)])
    return figure


def draw_noise(portrait: Portrait, theme: Theme) -> Figure:
    """Mean and spread of the step at growing signal in the gradient, and their ratio against that of the gradient:
    shows whether a rule averages noise away, beside Adam.
    """
    ours, adam = portrait.noise, portrait.adam_noise
    figure, (left, right) = start_figure(
        portrait.label,
        theme,
        "Response to noise in the gradient",
        "Left: what the noise leaves of the step. Right: above the diagonal, the rule removes noise.",
        "The gradient is a constant plus noise, of root mean square equal to the scale at every ratio; mean and "
        f"standard deviation over {DRAWS} draws and steps 60 to 120. Left: relative to the size of the optimizer's own "
        "step at the largest ratio. Right: negative means are at the lower edge."
        + _describe_neighbours(portrait, "the scale"),
        columns=2,
        margins=(0.72, 1.25),
        gap=0.75,
        top=0.95,
    )
    # Left, one scale is enough: steps are shown relative to the step without noise.
    middle, ratios = len(ours.scales) // 2, ours.ratios.numpy()
    heading: dict[str, Any] = {"color": theme.text, "size": 8}
    for measured, color, width in ((adam, GREY, 1.5), (ours, theme.subject, 2.2)):
        clear = measured.mean[middle, -1].item()
        mean, std = ((x[middle] / (abs(clear) or 1.0)).numpy() for x in (measured.mean, measured.std))
        left.fill_between(ratios, mean - std, mean + std, color=color, alpha=0.2, lw=0)
        left.plot(ratios, mean, color=color, lw=width)
    left.axhline(0, color=theme.faint, lw=0.8)
    left.set_title(f"gradient of scale {ours.scales[middle]:g}, step without noise {format_short(clear)}", **heading)
    left.set_ylabel("step / step without noise: mean \u00b1 std", color=theme.text)
    name_curves(figure, [(portrait.label, theme.subject), ("Adam", GREY)])
    # Right, all scales: what a rule makes of noise may depend on the size of the gradients.
    limits = (0.01, 1000.0)
    right.plot(ratios, ratios, color=theme.faint, lw=1, ls=(0, (2, 2)))
    anchors = [(locate(ours.ratios[-1], limits), "the gradient's", theme.faint)]
    curves = [(adam, middle, "Adam", GREY, 1.5)]
    curves += [(ours, i, f"scale {scale:g}", *shade_scale(i)) for i, scale in enumerate(ours.scales)]
    for measured, i, name, color, width in curves:
        quality = (measured.mean[i] / measured.std[i]).clamp(
            limits[0], 10 * limits[1]
        )  # beyond the top they leave the picture
        right.plot(ratios, quality.numpy(), color=color, lw=width)
        anchors.append((locate(quality[-1], limits), name, color))
    right.set(yscale="log", ylim=limits)
    label_ends(right, anchors)
    right.set_title("mean / standard deviation of the step", **heading)
    for axes in (left, right):
        axes.set(xscale="log", xlim=(ratios[0], ratios[-1]))
        axes.set_xlabel("signal to noise ratio of the gradient", color=theme.text)
    return figure


def draw_schedule(portrait: Portrait, theme: Theme) -> Figure:
    """The step under a constant gradient as the run goes on: shows the schedule that a rule has learned, by the clock
    or, for rules that read the training loss, by how it goes.
    """
    probed = portrait.schedule
    num_steps = probed.steps.shape[-1]
    reads = "It reads the training loss." if len(probed.losses) > 1 else ""
    clock = (
        f"It knows the planned length, here {num_steps} steps."
        if portrait.clocked
        else "It does not know how long the run will be."
    )
    figure, panels = start_figure(
        portrait.label,
        theme,
        "Step under a constant gradient, over the run",
        " ".join(filter(None, (clock, reads))),
        "Each colour is one gradient g, the same at every step; steps are shares of the largest at that gradient, "
        "which is written beside it." + _describe_neighbours(portrait, "the scale"),
        columns=len(probed.losses),
        margins=(0.72, 1.9),
        top=0.95,
    )
    # A rule that knows the planned length is shown over its share, another one over steps on a log scale.
    x = [t / num_steps if portrait.clocked else t + 1 for t in range(num_steps)]
    largest = [find_largest(probed.steps[:, i]) for i in range(len(probed.scales))]
    shares = probed.steps / torch.tensor([size or 1.0 for size in largest], dtype=torch.float32)[:, None]
    floor = min(0.0, torch.nan_to_num(shares).clamp(-1, 1).min().item())
    for axes, loss, curves in zip(panels, probed.losses, shares, strict=True):
        anchors = []
        for i, share in enumerate(curves):
            color, width = shade_scale(i)
            axes.plot(x, share.numpy(), color=color, lw=width, solid_capstyle="round")
            text = f"g = {probed.scales[i]:g}, largest {format_short(largest[i])}"
            anchors.append(((share[-1].item() - floor) / (1.05 - floor), text, color))
        axes.set_ylim(floor, 1.05)
        axes.axhline(0, color=theme.faint, lw=0.8)
        _scale_time(axes, portrait, theme)
        if len(probed.losses) > 1:
            axes.set_title(f"{loss} loss", color=theme.text, size=8)
        if axes is not panels[0]:
            axes.set_yticklabels([])
    label_ends(panels[-1], anchors)
    word = "progress: step / planned steps" if portrait.clocked else "step"
    panels[len(panels) // 2].set_xlabel(word, color=theme.text)
    panels[0].set_ylabel("step \u2212Δp / largest step", color=theme.text)
    return figure


def _scale_time(axes: Axes, portrait: Portrait, theme: Theme) -> None:
    """Progress for rules that know it; else steps on a log scale, with the end of the runs that it was trained on."""
    if portrait.clocked:
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
        return
    num_steps, horizon = portrait.schedule.steps.shape[-1], portrait.horizon
    axes.set(xscale="log", xlim=(1, num_steps))
    if horizon and 1 < horizon < num_steps:
        axes.axvline(horizon, color=theme.faint, lw=0.8, ls=(0, (2, 2)))
        look: dict[str, Any] = {"ha": "center", "size": 7.5, "color": theme.faint}
        axes.text(horizon, 1.02, f"trained for {horizon} steps", transform=axes.get_xaxis_transform(), **look)


PICTURES: dict[str, Callable[[Portrait, Theme], Figure]] = {
    "gradient": draw_gradient,
    "map": draw_map,
    "jump": draw_jump,
    "noise": draw_noise,
    "schedule": draw_schedule,
}


def _describe_growth(steps: Tensor) -> str:
    """How much the step grows over all gradients."""
    first, last = steps[0].item(), steps[-1].item()
    factor = f"{SIZES[-1] / SIZES[0]:,.0f}"
    if not first * last > 0:
        ends = f"from {format_short(first)} to {format_short(last)}"
        return f"While a steady gradient grows {factor}-fold, the step goes {ends}."
    ratio = last / first
    if abs(ratio - 1) < 0.01:
        return f"While a steady gradient grows {factor}-fold, the step stays the same."
    times = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    return f"While a steady gradient grows {factor}-fold, the step becomes {times} times as large."


def _describe_neighbours(portrait: Portrait, size: str) -> str:
    """What is around the probed entries."""
    if portrait.elementwise:
        return ""
    side = probes.SIDE
    return (
        f" This rule looks at whole tensors: {side} of the {side}x{side} entries of a matrix are probed; the other "
        f"gradients are noise as large as {size}."
    )
