"""The choice between the two backends of an optimizer: torch's ordinary operations, and kernels written in Triton."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from lopt.rules.programs.registry import find_missing

BACKENDS = ("auto", "torch", "triton")


class Backend(NamedTuple):
    """What computes an optimizer's steps, and why that was chosen; users read it as `optimizer.backend`.

    Attributes:
        name: "torch" or "triton". With "triton", parameters that kernels do not take are still stepped by torch.
        reason: in words, as printed by the benchmarks: what stood in the way of kernels, or that they were asked for.
    """

    name: str
    reason: str


def choose_backend(
    wanted: str, find_obstacle: Callable[[torch.device], str | None], devices: Iterable[torch.device], guarded: bool
) -> Backend:
    """The backend that an optimizer gets, decided once in its constructor; warns where it is not the one asked for.

    Args:
        wanted: one of `BACKENDS`. "auto" never runs Triton's interpreter, "triton" does, for tests.
        find_obstacle: why the rule has no fused step on a device where Triton runs, or None if it has one.
        devices: of the parameters; kernels are chosen if they run on one of them.
        guarded: with the guard, which works on whole steps.
    Returns:
        "triton" only where nothing stands in the way.
    """
    if wanted == "torch":
        return Backend("torch", "asked for")
    obstacle: str | None = "the guard works on steps that are not fused"
    if not guarded:
        interpreted, devices = wanted == "triton", set(devices)
        able = [device for device in devices if find_missing([device], interpreted) is None]
        obstacles = [find_obstacle(device) for device in able] or [find_missing(devices, interpreted)]
        obstacle = next(filter(None, obstacles), None)
    if obstacle is None:
        return Backend("triton", "the rule has a fused step" if wanted == "auto" else "asked for")
    if wanted == "triton":
        warnings.warn(f"backend='triton' falls back to torch: {obstacle}", stacklevel=4)
    return Backend("torch", obstacle)
