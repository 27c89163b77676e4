"""The rules that have a fused step, and where it can run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lopt_kernels.launching.op import try_triton

from lopt.rules import Rule
from lopt.rules.programs.base import Program
from lopt.rules.programs.elementwise import ELEMENTWISE_OPS, ElementwiseProgram
from lopt.rules.programs.features import FeatureProgram, ScheduledProgram, UnitProgram, VeLOProgram

FUSED: dict[str, type[Program]] = {
    **dict.fromkeys(ELEMENTWISE_OPS, ElementwiseProgram),
    "celo": ScheduledProgram,
    "celo2": UnitProgram,
    "celo2_base": UnitProgram,
    "mlp": FeatureProgram,
    "small_fc": FeatureProgram,
    "velo": VeLOProgram,
}


def find_obstacle(rule: Rule, device: torch.device) -> str | None:
    """Why there is no fused step for a rule on a device, or None if there is one."""
    if rule.name not in FUSED:
        return f"there is no fused step for rule {rule.name!r}; there is one for {', '.join(FUSED)}"
    return FUSED[rule.name].find_obstacle(rule, device)


def find_missing(devices: Iterable[torch.device], interpreted: bool) -> str | None:
    """Why Triton cannot run on any of these devices, or None if it can.

    Args:
        interpreted: its interpreter, which is for tests, counts.
    """
    obstacle: str | None = "there are no parameters"
    # In a fixed order, as the last obstacle is the one that users are told.
    for device in sorted(set(devices), key=str):
        if device.type == "cpu" and not interpreted:
            obstacle = "no parameter is on a GPU"
        elif device.type not in ("cpu", "cuda"):
            obstacle = f"there are no kernels for {device.type} devices"
        else:
            obstacle = try_triton(device)
        if obstacle is None:
            break
    return obstacle
