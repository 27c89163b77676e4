"""What few-shot tasks look like: the examples of each, and what a classifier makes of the queries."""

from __future__ import annotations

from io import BytesIO

import torch
from torch import Tensor

from lopt.evaluation.classes.episodes import Episodes

RIGHT, WRONG, GAP = (0.0, 0.62, 0.45), (0.84, 0.24, 0.0), (1.0, 1.0, 1.0)


def draw_tasks(episodes: Episodes, found: Tensor, *, rows: int = 6, dpi: int = 160) -> bytes:
    """A PNG with a task in each row: its examples, then the queries, class by class, framed by whether they were told.

    Args:
        episodes: of which the first are shown.
        found: classes that the queries were given, `[T, n]`.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    support, queries = episodes.support[:rows, :, 0], episodes.queries[:rows, :, 0]
    right = (found == episodes.answers)[:rows]
    frames = torch.where(
        right[..., None], torch.tensor(RIGHT, dtype=torch.float32), torch.tensor(WRONG, dtype=torch.float32)
    )
    panels = [_frame(support, torch.full((*support.shape[:2], 3), 0.5, dtype=torch.float32)), _frame(queries, frames)]
    widths = [panel.shape[1] for panel in panels]
    figure = Figure(figsize=(7.4, 0.2 + 7.2 * panels[0].shape[0] / (sum(widths) + 12)), layout="constrained")
    share = float(episodes.score(found).mean())
    told = f"other drawings, told right (green) or wrong (red); over {len(found)} tasks {share:.1%} right"
    titles = [f"{support.shape[1]} examples", told]
    axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": widths})
    for panel, title, ax in zip(panels, titles, axes, strict=True):
        ax.imshow(panel.numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.axis("off")
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()


def _frame(images: Tensor, colours: Tensor) -> Tensor:
    """Drawings `[rows, n, side, side]` side by side, dark on light, in frames of the colours `[rows, n, 3]`."""
    rows, count, side, _ = images.shape
    canvas = torch.tensor(GAP, dtype=torch.float32).expand(rows, count, side + 6, side + 6, 3).clone()
    canvas[:, :, 1:-1, 1:-1] = colours[:, :, None, None]
    canvas[:, :, 3:-3, 3:-3] = 1 - images[..., None]
    return canvas.permute(0, 2, 1, 3, 4).reshape(rows * (side + 6), count * (side + 6), 3)
