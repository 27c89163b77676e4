"""The rules that have a fused step."""

from __future__ import annotations

import torch

from lopt.fused.elementwise import AdamWProgram, LSTMProgram, RNNpropProgram
from lopt.fused.features import FeatureProgram, ScheduledProgram, UnitProgram, VeLOProgram
from lopt.fused.program import Program
from lopt.rules import Rule

FUSED: dict[str, type[Program]] = {
    "adam": AdamWProgram,
    "adamw": AdamWProgram,
    "celo": ScheduledProgram,
    "celo2": UnitProgram,
    "celo2_base": UnitProgram,
    "lstm": LSTMProgram,
    "mlp": FeatureProgram,
    "rnnprop": RNNpropProgram,
    "small_fc": FeatureProgram,
    "velo": VeLOProgram,
}


def find_obstacle(rule: Rule, device: torch.device) -> str | None:
    """Why there is no fused step for a rule on a device, or None if there is one."""
    if rule.name not in FUSED:
        return f"there is no fused step for rule {rule.name!r}; there is one for {', '.join(FUSED)}"
    return FUSED[rule.name].find_obstacle(rule, device)
