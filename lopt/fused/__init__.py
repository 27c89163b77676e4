"""Steps by the Triton kernels of `lopt_kernels`: all tensors of a rule in a few launches, whatever their number.

    parts    parameters and their state in the order of their memory
    step     what one step of many parameters is: clock, rates, gradients' addresses, then the rule's program
    programs which launches make a rule's step: `elementwise`, `features`

`FUSED` names the rules that have a program. It computes what the rule's stages compute (`lopt.rules.base`).
"""

from __future__ import annotations

from lopt.fused.elementwise import AdamWProgram, LSTMProgram, RNNpropProgram
from lopt.fused.features import FeatureProgram, ScheduledProgram, UnitProgram, VeLOProgram
from lopt.fused.program import Program
from lopt.fused.step import FusedStep
from lopt.rules import Rule

FUSED: dict[str, type[Program]] = {
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


def find_obstacle(rule: Rule) -> str | None:
    """Why there is no fused step for a rule, or None if there is one."""
    if rule.name not in FUSED:
        return f"there is no fused step for rule {rule.name!r}; there is one for {', '.join(FUSED)}"
    return FUSED[rule.name].find_obstacle(rule)


__all__ = ["FUSED", "FusedStep", "Program", "find_obstacle"]
