"""What is minimised: how the losses of a window make one number per task.

An objective is written as what each step adds to it, because evolution strategies have to know when a loss was
measured: which perturbation it counts for depends on the step. Backpropagation only needs the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lopt.meta.unroll.slots import Window
from lopt.tasks import TaskFamily
from lopt.tasks.tuned_adam import COMMAND, TunedAdam, load_archive

OBJECTIVES = ("mean", "sum", "log", "baseline", "final", "log_final")
OBJECTIVE_METRICS = ("accuracy",)
"""Metrics that may be minimised instead of the loss, as errors: shares, of which more is better."""

LOGARITHMIC = ("log", "baseline", "log_final", "log_tail")
TAIL = 0.1  # of a run, whose losses "tail" and "log_tail" average
TAIL_FLOOR = 1e-5  # of relative losses there: below it nobody cares which is lower


def weigh_losses(window: Window, family: TaskFamily, objective: str, *, normalize: bool, loss_clamp: float) -> Tensor:
    """What each step adds to the task's objective, `[K, T]`; the objective is their sum over the window.

    Args:
        family: that the tasks are of.
        objective: the "mean" or "sum" of the window's losses, the mean "log" loss relative to the first one, the same
            in units of tuned Adam's progress ("baseline"), the "final" losses of tasks that end in the window or
            ("log_final") their logs relative to the first ones, the mean of these over the last tenth of whole runs
            ("log_tail"), the mean loss there ("tail"), or the lowest loss ("min").
        normalize: divide every loss by the task's first loss, so that tasks of different scale count alike.
        loss_clamp: losses above this multiple of the task's first loss count, and are differentiated, as this multiple.

    "baseline" is (log(loss / first loss) - the same of tuned Adam after as many steps) / (how far Adam's own falls over
    its whole run): 0 is as tuned Adam; where Adam's run ends, 1 is no progress at all and -1 twice Adam's. So what is
    hard and what is easy weigh the same: its gradient is that of "log" over a number for each family.

    Raises:
        ValueError: objective "log" or "baseline" and a negative loss; "baseline" and a family that is not archived.
    """
    # Losses may be negative: it is the size of the first one that bounds and divides them.
    first, active = window.first_loss.abs(), window.active.to(window.losses.dtype)
    count = active.sum(0)
    # Clamped first: beyond the clamp a loss is a constant, to all objectives and to autograd.
    losses = torch.minimum(window.losses, loss_clamp * first)
    if objective in LOGARITHMIC:
        if bool((losses < 0).any()):
            raise ValueError(f"objective {objective!r} needs losses above 0, but a task's loss is negative; use 'mean'")
        # Losses of exactly 0 happen on easy tasks; their logarithm must not end the run.
        tiny = torch.finfo(losses.dtype).tiny
        if objective == "log_tail":
            return (losses / first + TAIL_FLOOR).log() * weigh_tail(window)
        relative = (losses / first).clamp(min=tiny).log()
        if objective == "baseline":
            tuned = find_baseline(family)
            # Both curves begin at 0: what is compared is the progress from a task's own start.
            adam = tuned.read_log_losses(window.steps) - math.log(tuned.first)
            relative = (relative.double() - adam) / tuned.progress
        return relative * (window.finished.to(losses.dtype) if objective == "log_final" else active / count)
    if normalize:
        losses = losses / first
    if objective == "final":
        return losses * window.finished.to(losses.dtype)
    if objective == "tail":
        return losses * weigh_tail(window)
    if objective == "min":
        # Resting steps have losses that mean nothing, and could be the lowest.
        where = losses.masked_fill(~window.active, math.inf).argmin(0, keepdim=True)
        return losses * torch.zeros_like(losses).scatter(0, where, 1.0)
    return losses * active / count if objective == "mean" else losses * active


def weigh_tail(window: Window) -> Tensor:
    """What the steps of whole runs count for in a mean over each one's last tenth, `[K, T]`."""
    tail = window.active & (window.steps > (1 - TAIL) * window.slots.horizon)
    return tail / tail.sum(0)


def find_baseline(family: TaskFamily) -> TunedAdam:
    """What tuned Adam reaches on `family`, for objective "baseline"; on its default options where others are given.

    Raises:
        ValueError: the archive has no such family, or losses on it that are not above 0.
    """
    tuned = family.nearest_baseline
    if tuned is None:
        raise ValueError(
            f"objective 'baseline' needs tuned Adam's losses on {family.describe()}; archived are those on "
            f"{', '.join(load_archive())}. Use one of these or objective 'log', or measure another "
            f"one of TASKS with `{COMMAND} --family NAME`"
        )
    # The archive averages losses arithmetically only where their logarithms do not exist.
    if tuned.average != "geometric":
        raise ValueError(
            f"objective 'baseline' needs losses above 0, but tuned Adam's on {family.describe()} are not all; "
            "use 'mean'"
        )
    return tuned
