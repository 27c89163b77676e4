"""Optimizers stepped with drawn gradients, and what is said meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lopt import LearnedOptimizer
from lopt.core.random import make_generator


def draw(i: int, shape: tuple[int, ...] = (3, 2)) -> Tensor:
    return torch.randn(shape, generator=make_generator(i))


def step_with(optimizer: LearnedOptimizer, step: int, loss: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            p.grad = draw(100 * step + i + 50).to(p.dtype)
    optimizer.step(loss=loss)


def list_warnings(optimizer: LearnedOptimizer, steps: Sequence[int], about: str = "num_steps") -> dict[int, str]:
    """What is said about something, by the step in which it is."""
    found = {}
    for step in steps:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step_with(optimizer, step)
        said = [str(w.message) for w in seen if about in str(w.message)]
        assert len(said) <= 1
        if said:
            found[step] = said[0]
    return found
