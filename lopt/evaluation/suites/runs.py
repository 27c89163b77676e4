"""One training run of a suite's task by any optimizer, and what is kept of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from time import thread_time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lopt.core.random import derive_seeds
from lopt.core.tensors import in_float32
from lopt.evaluation.statistics import keep_finite
from lopt.evaluation.suites.task import SuiteTask

BINS = 60
"""Means of equal parts of a run that its curve is kept as."""
DIVERGED = 10.0
"""A run that ends above this many times its first loss has diverged."""
WARM_UP = 5
"""First steps of an optimizer that are not timed."""


class Training(NamedTuple):
    """An optimizer as a training loop uses it.

    Attributes:
        optimizer: of the module's parameters.
        step: what is called after the backward pass, with the loss.
    """

    optimizer: Optimizer
    step: Callable[[Tensor], object]


Build = Callable[[nn.Module, int], Training]
"""Makes the optimizer for a module and a number of steps."""


@dataclass(frozen=True)
class Run:
    """What is kept of a run; losses are None where they are not finite.

    Attributes:
        label: the optimizer, such as "adamw".
        schedule: of its learning rate; "" for rules.
        lr: its learning rate.
        seed: of weights and batches.
        train: mean loss of the last tenth of the steps.
        validation, accuracy: after the last step, on held-out data.
        diverged: the loss was not finite, or ended above `DIVERGED` times its first value.
        step_ms: CPU time of the optimizer's step, mean, in milliseconds.
        seconds: CPU time of the run.
        curve: means of `BINS` equal parts of the run (fewer in runs that are shorter), to four digits.
    """

    label: str
    schedule: str
    lr: float
    seed: int
    train: float | None
    validation: float | None
    accuracy: float | None
    diverged: bool
    step_ms: float
    seconds: float
    curve: list[float | None] = field(default_factory=list)


@in_float32()
def train_task(
    task: SuiteTask,
    seed: int,
    build: Build,
    *,
    label: str,
    schedule: str = "",
    lr: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
) -> Run:
    """Train a task once, in one thread; torch's global generator is left as it was.

    The loop is the one that users write. It ends early where the loss is not finite.

    Args:
        seed: of weights, batches and what the module draws while it is trained.
        build: makes the optimizer.
        label, schedule, lr: what the run is kept under.
        on_step: hears of every step: how many are made, and the loss before it.
    """
    started, spent, losses = thread_time(), 0.0, []
    with torch.random.fork_rng(devices=[]), _one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this run goes beyond")  # a rule is judged wherever it was not trained
        model = task.model(seed).train()
        torch.manual_seed(int(derive_seeds(seed, "suite training")))  # for dropout and the like
        training = build(model, task.num_steps)
        for step in range(task.num_steps):
            loss = task.loss(model, task.batch(seed, step))
            losses.append(float(loss.detach()))
            if not isfinite(losses[-1]):
                break
            training.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            before = thread_time()
            training.step(loss.detach())
            if step >= WARM_UP:
                spent += thread_time() - before
            if on_step is not None:
                on_step(step + 1, losses[-1])
        # Averaging optimizers keep the weights to be used apart from those that are trained.
        if callable(use_averages := getattr(training.optimizer, "eval", None)):
            use_averages()
        validation = task.validate(model) if isfinite(losses[-1]) else None
    curve = _average(losses, task.num_steps)
    train = keep_finite(torch.tensor(losses[-max(1, task.num_steps // 10) :], dtype=torch.float64).mean())
    return Run(
        label=label,
        schedule=schedule,
        lr=lr,
        seed=seed,
        train=None if train is None else _shorten(train, 7),
        validation=None if validation is None else _keep(validation.loss, 7),
        accuracy=None if validation is None or validation.accuracy is None else _keep(validation.accuracy, 5),
        diverged=train is None or train > DIVERGED * losses[0],
        step_ms=_shorten(1e3 * spent / max(1, len(losses) - WARM_UP), 4),
        seconds=_shorten(thread_time() - started, 4),
        curve=curve,
    )


def _average(losses: list[float], num_steps: int) -> list[float | None]:
    """The curve: parts that were not reached, or are not finite, are None."""
    bins = min(BINS, num_steps)
    edges = [round(i * num_steps / bins) for i in range(bins + 1)]
    parts = [losses[a:b] for a, b in pairwise(edges)]
    return [_keep(sum(part) / len(part), 4) if part else None for part in parts]


def _keep(value: float, digits: int) -> float | None:
    return _shorten(value, digits) if isfinite(value) else None


def _shorten(value: float, digits: int) -> float:
    """Rounded to significant digits, which keeps archives small."""
    return float(f"{value:.{digits}g}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs are many and small: they go side by side, each in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
