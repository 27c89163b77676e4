"""Steps by the Triton kernels of `lopt_kernels`: all tensors of a rule in a few launches, whatever their number.

    dispatch  which parameters kernels step
    step      what one step of many parameters is: clock, rates, gradients' addresses, then the rule's program
    parts     parameters and their state in the order of their memory
    programs  which launches make a rule's step: `elementwise`, `features`; `registry` names the rules that have one
    operator  a step as one operator of torch, for `torch.compile`

A program computes what the rule's stages compute (`lopt.rules.base`).
"""

from lopt.fused.dispatch import Dispatch
from lopt.fused.registry import FUSED, find_obstacle

__all__ = ["FUSED", "Dispatch", "find_obstacle"]
