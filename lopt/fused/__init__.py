"""Steps by the Triton kernels of `lopt_kernels`: all tensors of a rule in a few launches, whatever their number.

    parts     parameters and their state in the order of their memory
    programs  which launches make a rule's step: `elementwise`, `features`; `registry` names the rules that have one
    step      what one step of many parameters is: clock, rates, gradients' addresses, then the rule's program
    operator  the same as one operator of torch, for `torch.compile`

A program computes what the rule's stages compute (`lopt.rules.base`).
"""

from lopt.fused.operator import register, step_in_graph
from lopt.fused.registry import FUSED, find_obstacle
from lopt.fused.step import FusedStep

__all__ = ["FUSED", "FusedStep", "find_obstacle", "register", "step_in_graph"]
