"""Which parameters of an optimizer kernels step, and with which tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lopt.optim.torch_backend.step import Member, Scaled, Unit
from lopt.optim.triton_backend.compiled import register, step_in_graph
from lopt.optim.triton_backend.step import FusedStep, find_step
from lopt.rules import Rule
from lopt.rules.programs.registry import find_missing, find_obstacle


class Dispatch:
    """The kernels' side of an optimizer, whose rules it knows by their indices.

    Args:
        enabled: the optimizer's backend is "triton".
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.numbers: list[
            int
        ] = []  # of the rules, see `lopt.optim.triton_backend.compiled`; 0 where kernels do not step them
        self.steps: dict[int, list[FusedStep]] = {}

    def add(self, rule: Rule, device: torch.device) -> None:
        """The next rule, whose parameters are on this device."""
        able = self.enabled and find_missing([device], interpreted=True) is None
        self.numbers.append(register(rule) if able and find_obstacle(rule, device) is None else 0)

    def clear(self) -> None:
        """Forget all rules."""
        self.numbers.clear()
        self.steps.clear()

    def choose(self, index: int, rule: Rule, units: list[Unit]) -> tuple[list[Unit], list[Unit]]:
        """The units, without some of their members, that kernels step under a rule, and what is left."""
        rows = bool(rule.tensor_keys)
        if not self.numbers[index] or (rows and torch.compiler.is_compiling()):
            return [], units
        fused, rest = [], []
        for unit in units:
            taken: list[Member] = []
            left: list[Member] = []
            for member in unit.members:
                (taken if unit.group["foreach"] is not False and FusedStep.takes(member) else left).append(member)
            fused += [unit._replace(members=taken)] if taken else []
            rest += [unit._replace(members=left)] if left else []
        return ([], units) if rest and rows else (fused, rest)  # with rows, all tensors step together

    def name_first(self, index: int, units: Sequence[Unit]) -> str | None:
        """What kernels do not take of units that they do not step, if the rule is one that they do."""
        if not self.numbers[index]:
            return None
        for unit in units:
            for member in unit.members:
                if member.shard is not None:
                    return "a DTensor"
                if not FusedStep.takes(member):
                    return f"a parameter of {member.p.dtype} with a gradient of {member.g.dtype}"
        return None

    def step(
        self,
        index: int,
        rule: Rule,
        units: Sequence[Unit],
        loss: Tensor | None,
        sanitize: bool,
        decay_scale: Callable[[Unit], float],
        tally: Tensor,
        amp: Scaled | None,
    ) -> None:
        """`FusedStep.step`; while torch.compile traces, a node of its graph."""
        if torch.compiler.is_compiling():
            decays = [float(unit.group["weight_decay"]) * decay_scale(unit) for unit in units]
            step_in_graph(self.numbers[index], units, decays, sanitize, tally, amp)
        else:
            known = self.steps.setdefault(index, [])
            find_step(known, rule, units).step(units, loss, sanitize, decay_scale, tally, amp)
