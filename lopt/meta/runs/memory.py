"""What is said where memory does not suffice: which settings are large, before anything runs where that is cheap."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lopt.core.nested import flatten_dict
from lopt.meta.config.run import RunConfig
from lopt.meta.estimators.backprop import Backprop
from lopt.meta.trainer.source import Source

FULL = re.compile(r"can't allocate memory|not enough memory|out of memory|can't start new thread")
OVERFLOWS = re.compile(r"overflow|cannot be represented as a SymInt|negative dimension", re.IGNORECASE)
"""What torch says where something is larger than memory, or than what its numbers can hold."""

LARGE = 1000
MAX_LISTED = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something was too large for memory, or for the numbers that count it."""
    if isinstance(error, (MemoryError, OverflowError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (FULL.search(text) or OVERFLOWS.search(text)) is not None


@contextmanager
def explain_memory(settings: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, a want of memory becomes an error of one line that names the largest settings.

    Args:
        settings: nested, by the names that a user knows; what is no number is left out.
    Raises:
        ValueError: in place of torch's or Python's own error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        overflows = isinstance(error, OverflowError) or OVERFLOWS.search(reason)
        what = "a number is too large" if overflows else "there is not enough memory"
        raise ValueError(f"{what} ({reason[:200]}): {_advise(settings)}") from error


def check_memory(config: RunConfig, sources: Sequence[Source]) -> None:
    """Refuse a run of which the least that it keeps is more than this machine's memory.

    That is the parameters of all its tasks, of those to validate and to judge on, and those of every step of a window
    that is differentiated. States and activations come on top, so much that passes this fails later.

    Raises:
        ValueError: it names the largest settings.
    """
    total = _measure_memory()
    if total is None:
        return
    trainer, judged = config.trainer, config.evaluation
    for source in sources:
        window = source.estimator.num_steps if isinstance(source.estimator, Backprop) else 0
        tasks = max(source.tasks + window, trainer.validation_tasks, judged.seeds)
        losses = max(trainer.validation_tasks * trainer.validation_steps, judged.seeds * max(judged.steps))
        least = 4 * (tasks * source.family.spec.size + losses)
        if least > total:
            raise ValueError(
                f"{source.family.describe()} takes at least {least / 2**30:,.0f} GiB, and this machine has "
                f"{total / 2**30:,.0f} GiB: {_advise(config.to_dict())}"
            )


def _advise(settings: Mapping[str, Any]) -> str:
    """Which settings to lower: the largest numbers."""
    flat = {key: value for key, value in flatten_dict(settings).items() if not key.endswith("seed")}
    numbers = {key: value for key, value in flat.items() if type(value) in (int, float) and value >= LARGE}
    largest = sorted(numbers, key=lambda key: -numbers[key])[:MAX_LISTED]
    if not largest:
        return "lower the sizes of task and rule, or the number of tasks"
    return f"the largest settings are {', '.join(f'{key} = {numbers[key]}' for key in largest)}; lower them"


def _measure_memory() -> int | None:
    """Bytes of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
