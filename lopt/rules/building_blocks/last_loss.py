"""The last loss that a rule was told, for rules that want its size and not its history."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.rules.stages import Accumulators

LOSS_KEY = "loss"
SMALLEST_LOSS = 1e-30
"""Below it a loss is as none."""


def start_loss(batch: tuple[int, ...], p: Tensor) -> Accumulators:
    """The accumulator `LOSS_KEY`, one of a rule's `tensor_keys`, before any loss is known.

    Args:
        batch: of the tensor, whose dtype and device are those of `p`.
    """
    return {LOSS_KEY: p.new_zeros(*batch, 1)}


def update_loss(known: Tensor, loss: Tensor | None) -> Tensor:
    """The last loss that was told, which maximised parameters have negated.

    Args:
        known: until now, `[*batch, n, 1]`; 0 before any was.
        loss: `[*batch, 1 or n]`; one that is None, not finite or 0 leaves everything as it was.
    """
    if loss is None:
        return known
    told = loss[..., None].to(known.dtype).expand_as(known)
    return torch.where(told.isfinite() & (told.abs() > SMALLEST_LOSS), told, known)


def find_inverse(known: Tensor) -> Tensor:
    """`1 / (4 |loss|)`, `[*batch, n]`, or 0 where none is known.

    For the squared error of one example of a linear model, whose gradient is g = -2 (error) x, it is 1 / (2 error)^2,
    so that g^2 times this is x^2.
    """
    inverse = torch.where(known != 0, 0.25 / known.abs().clamp(min=SMALLEST_LOSS), 0.0)
    return inverse[..., 0]
