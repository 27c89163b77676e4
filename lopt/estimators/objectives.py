"""What is minimised: how the losses of a window make one number per task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopt.unroll import Window

OBJECTIVES = ("mean", "sum", "log", "final")


def check_objective(objective: str, known: tuple[str, ...] = OBJECTIVES) -> str:
    """`objective` itself, if it is one of `known`.

    Raises:
        ValueError: it is not.
    """
    if objective not in known:
        raise ValueError(f"objective must be one of {known}, got {objective!r}")
    return objective


def weigh_losses(window: Window, objective: str, *, normalize: bool, loss_clamp: float) -> Tensor:
    """What each step adds to the task's objective, `[K, T]`; the objective is their sum over the window.

    Args:
        objective: the "mean" or "sum" of the window's losses, the mean "log" loss relative to the first one, the
            "final" losses of tasks that end in the window, or the lowest loss ("min").
        normalize: divide every loss by the task's first loss, so that tasks of different scale count alike.
        loss_clamp: losses above this multiple of the task's first loss count, and are differentiated, as this multiple.
    Raises:
        ValueError: objective "log" and a negative loss.
    """
    first, active = window.first_loss.abs(), window.active.to(window.losses.dtype)
    count = active.sum(0)
    losses = torch.minimum(window.losses, loss_clamp * first)
    if objective == "log":
        if bool((losses < 0).any()):
            raise ValueError("objective 'log' needs losses above 0, but a task's loss is negative; use 'mean'")
        tiny = torch.finfo(losses.dtype).tiny
        return (losses / first).clamp(min=tiny).log() * active / count
    if normalize:
        losses = losses / first
    if objective == "final":
        return losses * window.finished.to(losses.dtype)
    if objective == "min":
        where = losses.masked_fill(~window.active, math.inf).argmin(0, keepdim=True)
        return losses * torch.zeros_like(losses).scatter(0, where, 1.0)
    return losses * active / count if objective == "mean" else losses * active


def average_steps(window: Window, values: Tensor) -> Tensor:
    """Mean over the steps that were made, `[K, T]` -> `[T]`."""
    return (values * window.active).sum(0) / window.active.sum(0)


def find_finite(window: Window) -> Tensor:
    """Which tasks stayed finite, bool `[T]`."""
    values = [window.losses.T, window.slots.params, window.slots.grad, window.imitation.T]
    return torch.stack([v.isfinite().all(-1) for v in values]).all(0)
