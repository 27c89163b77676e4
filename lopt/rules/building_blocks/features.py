"""Accumulators and features that published rules share, written once.

Tensors are `[*batch, (features,) *shape]`; `lift` makes the dimension of features. Formulas and constants are those of
learned_optimization (Metz et al. 2022, arXiv 2203.11860) unless a docstring names another source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.tensors import is_traced
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Elements, Sum

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
TIME_NAMES = tuple(f"tanh(t/{scale:g} - 1)" for scale in TIME_SCALES)
PROGRESS_CENTERS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
NUM_LOSS_DECAYS = 10
NUM_LOSS_FEATURES = NUM_LOSS_DECAYS - 1
NO_LOSS = 999999999999.0  # the minimum of no losses; the released weights expect this number


def lift(x: Tensor, ndim: int) -> Tensor:
    """`[*batch, *shape]` -> `[*batch, 1, *shape]`: makes the dimension of features, in front of the shape."""
    return x.unsqueeze(-ndim - 1)


def spread(x: Tensor, ndim: int) -> Tensor:
    """`[..., features]` -> `[..., features, 1, ..., 1]`, to broadcast against `[*batch, features, *shape]`.

    Meta-weights and numbers of a tensor need it wherever they meet elements, as both may have batch dimensions.
    """
    return x.reshape(*x.shape, *[1] * ndim)


Piece = Tensor | tuple[Tensor, Tensor]
"""A group of features `[*batch, k, *shape]`, or two tensors that it is the product of."""


def join_pieces(pieces: list[Piece], p: Tensor, ndim: int) -> Tensor:
    """All groups one after the other, `[*batch, features, *shape]`, of a parameter p `[*batch, *shape]`.

    Products of two tensors are made here, so that without autograd each is written straight to its place.
    """
    if torch.is_grad_enabled() or is_traced():
        return torch.cat([piece if isinstance(piece, Tensor) else piece[0] * piece[1] for piece in pieces], -ndim - 1)
    # Without gradients products are written where they belong, which saves a copy of everything.
    factors = [(piece,) if isinstance(piece, Tensor) else piece for piece in pieces]
    counts = [max([x.shape[-ndim - 1] for x in group]) for group in factors]
    batch, shape = p.shape[: p.ndim - ndim], p.shape[p.ndim - ndim :]
    joined = factors[0][0].new_empty((*batch, sum(counts), *shape))
    for piece, place in zip(pieces, torch.split(joined, counts, -ndim - 1), strict=True):
        if isinstance(piece, Tensor):
            place.copy_(piece)
        else:
            torch.mul(*piece, out=place)
    return joined


# -- accumulators ------------------------------------------------------------------------------------------------------


def start_averages(p: Tensor, count: int, ndim: int) -> Tensor:
    """The moving averages of a parameter before the first step: contiguous zeros `[*batch, count, *shape]`."""
    # Copies, not an expanded view: every average is updated in place, in memory of its own.
    return torch.zeros_like(p).unsqueeze(-ndim - 1).repeat_interleave(count, -ndim - 1)


def average(old: Tensor, new: Tensor, decays: Tensor) -> Tensor:
    """Exponential moving averages, `b old + (1 - b) new`, without bias correction; all broadcast.

    Policies that read them are told the number of steps, or learned to do without.
    """
    return torch.lerp(new, old, decays)


def learned_decays(offsets: Tensor, initial: Tensor) -> Tensor:
    """Decays as small_fc_lopt learns them: `1 - exp(10 (offset + log(1 - initial) / 10))`, at most 1."""
    return 1 - (1 - initial) * torch.exp(10 * offsets)


# -- factored second moments (Adafactor, Shazeer & Stern 2018, arXiv 1804.04235) ---------------------------------------


def start_lines(p: Tensor, count: int, layout: Layout) -> Accumulators:
    """Zero row and column averages of a matrix or more: the dimension that is averaged over has size 1."""
    assert layout.factored is not None
    larger, smaller = layout.factored
    return {
        "rows": start_averages(p.narrow(larger, 0, min(1, p.shape[larger])), count, layout.ndim),
        "cols": start_averages(p.narrow(smaller, 0, min(1, p.shape[smaller])), count, layout.ndim),
    }


def sum_lines(g: Tensor, layout: Layout) -> dict[str, Sum]:
    """Sums of g^2 over the largest dimension (rows) and over the second largest (cols), of a matrix or more.

    1e-30 is added to every square, as in the source, so that a line of zeros has a finite inverse root.
    """
    assert layout.factored is not None
    larger, smaller = layout.factored
    square = lift(g.square() + 1e-30, layout.ndim)
    return {
        "rows": Sum(square.sum(larger, keepdim=True), (larger,)),
        "cols": Sum(square.sum(smaller, keepdim=True), (smaller,)),
    }


def scale_lines(rows: Tensor, cols: Tensor, layout: Layout) -> Accumulators:
    """Row and column factors whose product replaces 1 / sqrt(second moment) of a matrix or more.

    Args:
        rows, cols: averages of the means of `sum_lines`, `[*batch, k, *shape]` with size 1 where the mean is taken.
    Returns:
        Fields "row_scale" and "col_scale" of the same shapes.
    """
    assert layout.factored is not None
    # Rows count relative to their mean, as the scale of the gradient is in the columns' factor already.
    relative = rows / (rows.mean(layout.factored[1], keepdim=True) + 1e-9)
    return {"row_scale": relative.clamp(min=1e-9).rsqrt(), "col_scale": cols.clamp(min=1e-9).rsqrt()}


# -- normalisation -----------------------------------------------------------------------------------------------------


def sum_squares(pieces: list[Tensor], axes: tuple[int, ...], e: Elements) -> Sum:
    """Sum of squares of features `[*batch, k, *shape]` over `axes`, kept with size 1, for their normalisation.

    Over a whole tensor it is a vector norm squared, which reads the features once and writes no squares.
    """
    whole = len(axes) == e.layout.ndim
    squares = [
        torch.linalg.vector_norm(x, dim=axes, keepdim=True).square() if whole else x.square().sum(axes, keepdim=True)
        for x in pieces
    ]
    return Sum(torch.cat(squares, -e.layout.ndim - 1), axes)


# -- time and loss -----------------------------------------------------------------------------------------------------


def time_features(step: Tensor, scales: Tensor) -> Tensor:
    """`tanh(t / tau - 1)` for the eleven `TIME_SCALES`, t updates made so far: `[...]` -> `[..., 11]`."""
    return torch.tanh(step[..., None].to(scales.dtype) / scales - 1)


def progress_features(progress: Tensor, centers: Tensor) -> Tensor:
    """`tanh(10 (t/T - s))` for the nine `PROGRESS_CENTERS`: `[...]` -> `[..., 9]` (Metz et al. 2022, 2211.09760)."""
    return torch.tanh(10 * (progress[..., None] - centers))


def start_loss_buffer(batch: tuple[int, ...], like: Tensor) -> Accumulators:
    """No loss seen yet: averages and their minima `[*batch, 10]`, and how many losses `[*batch, 1]`."""
    return {
        "loss_mean": like.new_zeros(*batch, NUM_LOSS_DECAYS),
        "loss_min": like.new_full((*batch, NUM_LOSS_DECAYS), NO_LOSS),
        "loss_count": like.new_zeros(*batch, 1),
    }


def loss_decays(num_steps: Tensor, dtype: torch.dtype) -> Tensor:
    """`exp(-1/h)` of ten half-lives from 10 to `num_steps`, in equal ratios: `[...]` -> `[..., 10]`."""
    share = torch.linspace(0, 1, NUM_LOSS_DECAYS, dtype=dtype, device=num_steps.device)
    halflife = 10 ** (1 + share * (num_steps.to(dtype).log10() - 1)[..., None])
    return torch.exp(-1 / halflife)


def update_loss_buffer(buffer: Accumulators, loss: Tensor | None, decays: Tensor) -> Accumulators:
    """The buffer after `loss` `[...]`, which is capped at twice the largest average.

    Without a loss the buffer stays as it was. So it does after one that makes it infinite or NaN (differs from the
    source, where all later steps are NaN, too).
    """
    if loss is None:
        return buffer
    count = buffer["loss_count"]
    loss = loss[..., None]
    largest = _correct(buffer["loss_mean"], decays, count + 1).amax(-1, keepdim=True)
    # Nothing can be compared with the first loss, which is its own cap.
    cap = 2 * torch.where(count == 0, loss, largest).abs()
    mean = average(buffer["loss_mean"], torch.minimum(loss, cap), decays)
    lowest = torch.minimum(buffer["loss_min"], _correct(mean, decays, count + 1))
    new = {"loss_mean": mean, "loss_min": lowest, "loss_count": count + 1}
    finite = mean.isfinite().all(-1, keepdim=True)
    return {key: torch.where(finite, value, buffer[key]) for key, value in new.items()}


def loss_features(buffer: Accumulators, decays: Tensor) -> Tensor:
    """How far each average is above its minimum, against the next slower one: `[..., 9]` in [-1, 1], first two 0."""
    count = buffer["loss_count"]
    mean = _correct(buffer["loss_mean"], decays, count.clamp(min=1))
    lowest = buffer["loss_min"][..., :-1]
    ratio = (mean[..., :-1] - lowest) / (mean[..., 1:] - lowest).clamp(min=1e-8)
    return torch.where(count <= 2, torch.zeros_like(ratio), (ratio - 1).clamp(-1, 1))


def _correct(mean: Tensor, decays: Tensor, count: Tensor) -> Tensor:
    """Bias correction after `count` losses."""
    return mean / (1 - decays**count)
