"""Which parameters of a rule kernels step, and with which tables: `torch.compile` finds both again by a number.

Tables are dear to make and cheap to use; a few sets of them are kept for each rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lopt.optim.triton_backend.step import FusedStep
from lopt.optim.units import Member, Scaled, Unit
from lopt.rules import Rule
from lopt.rules.programs.registry import find_missing, find_obstacle

MAX_STEPS = 8  # sets of parameters with gradients, as of the two networks of a GAN, whose tables are kept


class RuleKernels:
    """The kernels' side of one rule on one device: which parameters they take, and the tables of past steps.

    Args:
        rule: one that has a program there; `find_kernels` looks.
    Attributes:
        number: stands for this object in graphs of torch.compile, which hold numbers and tensors only (`REGISTERED`).
        state_names: the orders of entries in parameters' states that have occurred; a graph has their indices.
        steps: those of the last few sets of parameters, and those that CUDA graphs address.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule, self.number = rule, next(_NUMBERS)
        self.state_names: list[tuple[str, ...]] = []
        self.steps: list[FusedStep] = []
        REGISTERED[self.number] = self

    def learn_names(self, names: tuple[str, ...]) -> None:
        """Note the entries of a parameter's state, before a graph that steps it is traced."""
        if names not in self.state_names:
            self.state_names.append(names)

    def divide(self, units: list[Unit]) -> tuple[list[Unit], list[Unit]]:
        """The units, without some of their members, that kernels step, and what is left for torch.

        Rules with `tensor_keys` look at all tensors together: kernels step all or none of them, and none while
        torch.compile traces.
        """
        rows = bool(self.rule.tensor_keys)
        if rows and torch.compiler.is_compiling():
            return [], units
        # Members are sorted one by one: a group may mix dtypes, of which kernels take only some.
        fused, others = [], []
        for unit in units:
            taken: list[Member] = []
            refused: list[Member] = []
            for member in unit.members:
                fits = unit.groups[0]["foreach"] is not False and FusedStep.takes(member)
                (taken if fits else refused).append(member)
            fused += [unit._replace(members=taken)] if taken else []
            others += [unit._replace(members=refused)] if refused else []
        return ([], units) if others and rows else (fused, others)

    def describe_first(self, units: Sequence[Unit]) -> str | None:
        """The first parameter that kernels cannot step, in words for a warning; None if the user asked for torch."""
        for unit in units:
            for member in unit.members:
                if member.shard is not None:
                    return "a DTensor"
                if not FusedStep.takes(member):
                    return f"a parameter of {member.p.dtype} with a gradient of {member.g.dtype}"
        return None

    def step(
        self,
        units: Sequence[Unit],
        loss: Tensor | None,
        sanitize: bool,
        decay_scale: Callable[[Unit], float],
        tally: Tensor,
        amp: Scaled | None,
    ) -> None:
        """One step of the members of some units, in place, by tables that are made anew only when these change.

        Args:
            units, loss, sanitize, decay_scale, tally, amp: as for `FusedStep.step`.
        """
        step = next((step for step in self.steps if step.matches(units)), None)
        if step is None:
            # What CUDA graphs address must stay; of the others, the oldest goes.
            step = FusedStep(self.rule, units)
            spare = [old for old in self.steps if not old.captured][MAX_STEPS - 1 :]
            self.steps = [step, *(old for old in self.steps if old not in spare)]
        step.step(units, loss, sanitize, decay_scale, tally, amp)


# Graphs outlive optimizers: a number without its rule is never asked for again, and must not keep it alive.
_NUMBERS = itertools.count(1)
REGISTERED: WeakValueDictionary[int, RuleKernels] = WeakValueDictionary()


def find_kernels(rule: Rule, device: torch.device) -> RuleKernels | None:
    """The kernels of a rule whose parameters are on a device, or None where Triton cannot run or they do not take it.

    Triton's interpreter counts: whether it is wanted was decided for all of the optimizer (`choose_backend`).
    """
    if find_missing([device], interpreted=True) is not None or find_obstacle(rule, device) is not None:
        return None
    return RuleKernels(rule)
