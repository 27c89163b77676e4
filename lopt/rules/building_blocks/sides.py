"""Matrices for the sides of a tensor, which mix the elements of a step along rows, columns and kernel positions.

Source: Park & Oliva 2019, arXiv 1902.03356, "Meta-Curvature", section 3.2: the gradient `[out, in, positions]` of a
layer is multiplied by a learned matrix along each of its sides, which is a preconditioner of Kronecker products.
Differs from the source: sides of one element have no matrix, and the first one starts as a learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def list_sides(shape: Sequence[int]) -> list[int]:
    """The sides of a tensor that have a matrix: outputs, inputs and all positions of a kernel; always one or more.

    >>> list_sides([40, 1]), list_sides([8, 3, 5, 5]), list_sides([])
    ([40], [8, 3, 25], [1])
    """
    sides = [*shape[:2], prod(shape[2:])] if len(shape) > 2 else list(shape)
    return [d for d in sides if d != 1] or [1]


def start_matrices(shape: Sequence[int], rate: float) -> list[Tensor]:
    """Matrices `[d, d]`, one for each side, that together multiply a step by `rate`."""
    scales = [rate, *[1.0] * (len(list_sides(shape)) - 1)]
    return [scale * torch.eye(d, dtype=torch.float32) for scale, d in zip(scales, list_sides(shape), strict=True)]


def mix_sides(x: Tensor, matrices: Sequence[Tensor], ndim: int) -> Tensor:
    """A step with its sides multiplied by their matrices, like `x`.

    Args:
        x: `[*batch, *shape]`.
        matrices: `[*batch or (), d, d]`, in the order of `list_sides(shape)`.
        ndim: number of dimensions of `shape`.
    """
    if not x.numel():
        return x
    batch, shape = x.shape[: x.ndim - ndim], x.shape[x.ndim - ndim :]
    before, after = 1, prod(shape)
    for matrix in matrices:
        d = matrix.shape[-1]
        after //= d
        if after == 1:
            # The last side: one product instead of one for each of the sides before it.
            x = x.reshape(*batch, before, d) @ matrix.mT
        else:
            rows = matrix if before == 1 else matrix.unsqueeze(-3)
            x = rows @ x.reshape(*batch, *([] if before == 1 else [before]), d, after)
        before *= d
    return x.reshape(*batch, *shape)
