"""The two backends of an optimizer: torch's ordinary operations, and kernels written in Triton.

Which one is decided once, by `choose_backend`. In a step, kernels then step what they take of the parameters that one
rule steps on one device, and torch steps the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.optim.guard.decisions import Guard
from lopt.optim.guard.steps import make_transform, scale_decay
from lopt.optim.loss import read_scaler, to_scalar
from lopt.optim.report import Counts
from lopt.optim.rule_replicas import Replica
from lopt.optim.torch_backend.step import make_units, step_units
from lopt.optim.triton_backend.compiled import step_in_graph
from lopt.optim.units import Unit
from lopt.rules import Rule
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
    # Devices without Triton do not matter where there is another one with it: torch steps what is on the former.
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


class StepOptions(NamedTuple):
    """What holds for all rules and devices of one step of an optimizer.

    Attributes:
        loss: the training loss, or None; rules that do not read it get none.
        sanitize: entries of gradients that are not finite count as 0; otherwise such gradients are skipped.
        guard: mixes AdamW's steps with the rule's, if there is one.
        lr_adamw: AdamW's learning rate, for the guard.
        found_inf, grad_scale: what a gradient scaler has left in the optimizer, if one steps it.
        counts: of the optimizer; skipped, limited and clipped parameters are added.
    """

    loss: Tensor | float | None
    sanitize: bool
    guard: Guard | None
    lr_adamw: float
    found_inf: Tensor | None
    grad_scale: Tensor | None
    counts: Counts


def step_replica(replica: Replica, units: list[Unit], options: StepOptions) -> None:
    """Step the parameters of one rule on one device, in place: by kernels where these take them, and by torch.

    Args:
        units: one for each group, with whatever parameters; here they are divided further.
    """
    rule, device, kernels = replica
    tally, sanitize = options.counts.tally[device], options.sanitize
    loss = None if options.loss is None or not rule.needs_loss else to_scalar(options.loss, device)
    decay = partial(scale_decay, options.guard, rule=rule, lr_adamw=options.lr_adamw)
    with _without_autocast(device.type):
        amp = read_scaler(options.found_inf, options.grad_scale, device)
        fused, others = ([], units) if kernels is None else kernels.divide(units)
        if kernels is not None and fused:
            # A graph cannot hold the tables of a fused step: there it is one operator, which finds them again.
            if torch.compiler.is_compiling():
                decays = [float(unit.groups[0]["weight_decay"]) * decay(unit) for unit in fused]
                step_in_graph(kernels, fused, decays, sanitize, tally, amp)
            else:
                kernels.step(fused, loss, sanitize, decay, tally, amp)
        if others:
            # Users who have asked for kernels are told once why some parameters are slower.
            if kernels is not None and (kind := kernels.describe_first(others)) is not None:
                options.counts.warn_once(f"kernels do not step {kind}: torch does.")
            transforms = partial(make_transform, options.guard, lr_adamw=options.lr_adamw, clipped=tally[2])
            counts = step_units(rule, divide_groups(rule, others), loss, sanitize, transforms, decay, amp)
            for place, count in enumerate(counts):
                if isinstance(count, Tensor) or count:  # 0 as a rule, known to the host
                    tally[place].add_(count)


def divide_groups(rule: Rule, units: Iterable[Unit]) -> list[Unit]:
    """The units of groups as those that torch steps as one tensor; see `make_units`."""
    return list(make_units(rule, units))


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """No autocast while a rule steps: it computes in fp32 whatever the model around it does."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.10 does not trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
