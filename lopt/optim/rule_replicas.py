"""The rules that step an optimizer's parameters: the user's and AdamW, with their weights where they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.optim.group_adamw import GroupAdamW
from lopt.optim.options import ADAMW
from lopt.optim.triton_backend.dispatch import RuleKernels, find_kernels
from lopt.rules import Rule, find_layout
from lopt.rules.files import check_weights


def freeze_rule(rule: Rule) -> Rule:
    """A copy in fp32 that an optimizer steps with: the user's own rule stays trainable, and may be given to others.

    Raises:
        ValueError: a meta-weight is not finite, or the rule belongs to one model and is no optimizer for any.
    """
    if rule.initial_params is not None:
        raise ValueError(f"rule {rule.name!r} says where one model starts, too: adapt that model by lopt.adapt")
    frozen: Rule = deepcopy(rule).float().requires_grad_(False)
    check_weights(frozen)
    return frozen


class Replica(NamedTuple):
    """A rule that steps parameters of one device.

    Attributes:
        rule: frozen, with its weights on the device.
        device: of the parameters.
        kernels: what steps them by kernels, or None where torch does.
    """

    rule: Rule
    device: torch.device
    kernels: RuleKernels | None


class RuleReplicas:
    """Keeps a copy of the rule, and an AdamW, for each device; made when first needed.

    While `torch.compile` traces a step, rules are known by their indices here. Copies are not pickled.
    Those that have stepped a parameter are counted, including rules to which the user's delegates some.

    Args:
        rule: the optimizer's, on the CPU; used as it is for parameters there.
        fused: kernels step what they can.
    """

    def __init__(self, rule: Rule, fused: bool) -> None:
        self.rule, self.fused = rule, fused
        self._replicas: list[Replica] = []
        self._rules: dict[tuple[torch.device, bool], Rule] = {}
        self._indices: dict[Rule, int] = {}

    def __getitem__(self, index: int) -> Replica:
        return self._replicas[index]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def find_rule(self, name: str, p: Tensor, group: Mapping[str, Any]) -> Rule:
        """The rule that steps a parameter: its group's, or another one to which that delegates it by name or shape.

        Args:
            group: of the optimizer's `param_groups`, with AdamW's options.
        """
        rule = self._find_groups_rule(p.device, group)
        return rule.delegate(name, find_layout(tuple(p.shape))) or rule

    def _find_groups_rule(self, device: torch.device, group: Mapping[str, Any]) -> Rule:
        key = device, group["rule"] == ADAMW
        if key not in self._rules:
            rule = GroupAdamW().requires_grad_(False) if group["rule"] == ADAMW else self.rule
            self._rules[key] = rule if device.type == "cpu" else deepcopy(rule).to(device)
        return self._rules[key]

    def find_index(self, rule: Rule, device: torch.device) -> int:
        """Where a rule that `find_rule` returned is among the replicas, to which it is added the first time.

        Args:
            device: of the parameter that it was found for; a rule has weights on one device only.
        """
        # Found by identity: two rules with equal weights are still stepped one after the other.
        if rule not in self._indices:
            self._indices[rule] = len(self._replicas)
            self._replicas.append(Replica(rule, device, find_kernels(rule, device) if self.fused else None))
        return self._indices[rule]

    def list_rules(self) -> list[Rule]:
        """The user's rule and all copies that hold memory of their own, each once, for those who count that memory."""
        return list(dict.fromkeys([self.rule, *self._rules.values()]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_replicas": [], "_rules": {}, "_indices": {}}
