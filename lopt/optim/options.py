"""The options of `LearnedOptimizer`, checked at the boundary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.optim.guard.decisions import GuardOptions
from lopt.rules import Rule
from lopt.rules.programs.registry import find_missing

ADAMW = "adamw"
STATE_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("auto", "torch", "triton")


class Backend(NamedTuple):
    """What computes the steps, and why it was chosen."""

    name: str
    reason: str


def choose(name: str, value: str, known: Iterable[str]) -> str:
    """The value, if it is one of those known.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def choose_backend(
    wanted: str, find_obstacle: Callable[[torch.device], str | None], devices: Iterable[torch.device], guarded: bool
) -> Backend:
    """The backend that runs; a warning where it is not the one asked for.

    Args:
        find_obstacle: why the rule has no fused step on a device where Triton runs, or None if it has one.
        devices: of the parameters.
        guarded: with the guard, which works on whole steps.
    """
    if wanted == "torch":
        return Backend("torch", "asked for")
    obstacle: str | None = "the guard works on steps that are not fused"
    if not guarded:
        interpreted, devices = wanted == "triton", set(devices)
        able = [device for device in devices if find_missing([device], interpreted) is None]
        found = [find_obstacle(device) for device in able] or [find_missing(devices, interpreted)]
        obstacle = next(filter(None, found), None)
    if obstacle is None:
        return Backend("triton", "the rule has a fused step" if wanted == "auto" else "asked for")
    if wanted == "triton":
        warnings.warn(f"backend='triton' falls back to torch: {obstacle}", stacklevel=4)
    return Backend("torch", obstacle)


def check_state_dtype(dtype: torch.dtype, rule: Rule) -> torch.dtype:
    """The dtype, if the rule's state can be kept in it.

    Raises:
        ValueError: it cannot.
    """
    if dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(map(str, STATE_DTYPES))}, got {dtype}")
    if dtype != torch.float32 and not rule.compact_keys:
        raise ValueError(
            f"the averages of rule {rule.name!r} change by less than {dtype} can hold: its state is kept in "
            "torch.float32. torch.bfloat16 is for rules whose state is a recurrent network's (lstm, rnnprop)."
        )
    return dtype


def read_guard(given: bool | GuardOptions | Mapping[str, Any]) -> GuardOptions | None:
    """The guard's options, or None for no guard.

    Raises:
        ValueError: something else, an unknown option or one out of range.
    """
    if isinstance(given, GuardOptions):
        return given
    if isinstance(given, bool):
        return GuardOptions() if given else None
    try:
        return GuardOptions(**given)
    except TypeError as error:
        raise ValueError(f"guard must be True, False, GuardOptions or a dictionary of them, got {given!r}") from error


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a group's options out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {list(lr.shape)}")
    for name in ("lr", "weight_decay", "eps"):
        if not (_is_number(options[name]) and isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {options[name]}")
    betas = options["betas"]
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"betas must be two numbers, at least 0 and below 1, got {betas}")
    num_steps = options["num_steps"]
    if num_steps is not None and not (isinstance(num_steps, Integral) and int(num_steps) >= 1):
        raise ValueError(f"num_steps must be at least 1 and whole, or None, got {num_steps}")
    for name in ("maximize", "foreach", "capturable"):
        if options[name] not in (True, False, None):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | Tensor)


def check_gradients(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise RuntimeError for parameters with a gradient that cannot be stepped."""
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"LearnedOptimizer does not support sparse gradients (a parameter of shape {list(p.shape)} has "
                    "one). Set sparse=False in its module, or give that parameter an optimizer of its own."
                )
            if p.is_complex():
                raise RuntimeError(
                    f"LearnedOptimizer does not support complex parameters (one of shape {list(p.shape)}). "
                    "Make the parameter real and use torch.view_as_complex in the model."
                )
