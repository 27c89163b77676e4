"""Rates of elements beside a few directions: what an element does depends on the steps of all tensors' elements.

The step is multiplied by a matrix over all parameters together, `diag(factor) + write' read`, of low rank but for its
diagonal. `read` has R weighted sums of a whole step, the support set as R numbers, and `write` what follows from each.
Compare Meta-Curvature (Park & Oliva 2019, arXiv 1902.03356), whose matrices mix the elements of one tensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

PARTS = ("factor", "read", "write")


def start_low_rank(
    shape: Sequence[int], rate: float, rank: int, size: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The `PARTS` of a tensor before any training, which multiply its step by `rate`.

    Args:
        rank: number of directions.
        size: elements of all tensors together, by which a sum that is read is of the size of one element's step.
        generator: of what is read; two sums that were alike would stay alike.
    Returns:
        `factor` `[*shape]`, `read` and `write` `[rank, *shape]`.
    """
    read = torch.randn((rank, *shape), generator=generator, dtype=torch.float32) / size**0.5
    return {
        "factor": torch.full(tuple(shape), rate, dtype=torch.float32),
        "read": read,
        "write": torch.zeros_like(read),
    }


def mix_all(step: Tensor, factor: Tensor, read: Tensor, write: Tensor) -> Tensor:
    """`(diag(factor) + write' read) step`, like `step`.

    Args:
        step: `[*batch, P]`, of all parameters.
        factor: `[*batch or (), P]`.
        read, write: `[*batch or (), rank, P]`.
    """
    return factor * step + ((step[..., None, :] @ read.mT) @ write)[..., 0, :]


def measure_mixing(factor: Tensor, read: Tensor, write: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, float]:
    """What a tensor's elements take from their own steps, flat, and the share of the squares that others' are.

    Args:
        factor, read, write: of the tensor.
        others: `read` of all tensors, this one included.
    """
    rank = len(read)
    rows, heard = write.reshape(rank, prod(factor.shape)), torch.cat([x.reshape(rank, -1) for x in others], 1)
    own = factor.flatten() + (rows * read.reshape(rows.shape)).sum(0)
    # The sum of the squares of all rows without the rows: the diagonal and the rest, apart and together.
    rest = float(((heard @ heard.T) * (rows @ rows.T)).sum())
    whole = rest + float(own.square().sum() - (own - factor.flatten()).square().sum())
    return own, 1 - float(own.square().sum()) / whole if whole else 0.0
