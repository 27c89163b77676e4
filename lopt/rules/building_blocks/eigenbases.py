"""Eigenbases of a matrix' second moments, two steps of orthogonal iteration at a time, long sides in blocks.

Source: Vyas et al. 2024, arXiv 2409.11321 (SOAP), which renews bases by a QR decomposition; blocks as in Anil et al.
2020, arXiv 2002.09018. Differs from the sources: nothing is sorted, and blocks divide one side at a time, so that a
block of rows has their second moments over all columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from lopt.core.tensors import is_traced
from lopt.rules.layout import Layout

SIDES = ("left", "right")
RIDGE = 3e-3  # of a factor's trace: where it has no full rank, a basis would follow rounding alone


def find_block(n: int, most: int) -> int:
    """How many of n lines a block has, where there are as few as can be of at most `most`; the last may have less."""
    return ceil(n / ceil(n / most)) if n else 1


def find_form(side: str, block: int, layout: Layout) -> list[int]:
    """The shape of what is kept of a side: what rows, or columns, share is a number for each place in a block."""
    ones = [1] * (layout.ndim - 1)
    return [layout.shape[0], block, *ones] if side == "left" else [block, 1, *layout.shape[1:]]


def split(x: Tensor, block: int) -> Tensor:
    """Lines `[..., n, m]` in blocks `[..., c, block, m]`, the last one filled up with 0."""
    missing = -x.shape[-2] % block
    filled = nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
    return filled.reshape(*x.shape[:-2], filled.shape[-2] // block, block, x.shape[-1])


def join(x: Tensor, n: int) -> Tensor:
    """Undoes `split`."""
    return x.flatten(-3, -2)[..., :n, :]


def read_blocks(kept: Tensor, side: str, batch: Sequence[int], n: int, block: int) -> Tensor:
    """The blocks `[*batch, c, block, block]` of what is kept of a side of n lines, `[*batch, *find_form(...)]`."""
    if side == "left":
        return split(kept.reshape(*batch, n, block), block)
    return split(kept.reshape(*batch, block, n).mT, block).mT


def write_blocks(blocks: Tensor, side: str, like: Tensor, n: int) -> Tensor:
    """Undoes `read_blocks`, in the shape of `like`."""
    return (join(blocks, n) if side == "left" else join(blocks.mT, n).mT).reshape(like.shape)


def iterate(factor: Tensor, basis: Tensor) -> Tensor:
    """Two steps of orthogonal iteration at once from `basis` towards the eigenvectors of `factor`, `[..., n, n]`; from
    the identity where there is no basis yet, and for lines that only fill up a block.
    """
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    start = torch.where((basis == 0).all(-1, keepdim=True), one, basis)
    relative = torch.where(trace > 0, factor / torch.where(trace > 0, trace, 1.0), 0.0)
    power = relative + RIDGE * one
    return _orthogonalise(power @ (power @ start))


def rotate(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    """Elements `[*batch, rows, columns]` in the bases of both sides, `[*batch, c, n, n]` or None."""
    left, right = bases
    if left is not None:
        x = join(left.mT @ split(x, left.shape[-1]), x.shape[-2])
    return x if right is None else join(right.mT @ split(x.mT, right.shape[-1]), x.shape[-1]).mT


def rotate_back(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    """Undoes `rotate`."""
    return rotate(x, [None if basis is None else basis.mT for basis in bases])


def _orthogonalise(x: Tensor) -> Tensor:
    """The orthogonal factor of a QR decomposition, `[..., n, n]`."""
    if x.device.type == "cpu" and not (x.requires_grad or is_traced()):
        # The same routines, without the other factor: a quarter of the time is for that.
        q: Tensor = torch.linalg.householder_product(*torch.geqrf(x))
    else:
        q = torch.linalg.qr(x)[0]
    return q
