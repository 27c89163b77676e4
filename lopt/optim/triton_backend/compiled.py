"""The fused step as one operator of torch, so that `torch.compile(optimizer.step)` keeps it whole in its graph.

The operator sees tensors and numbers only. What else a step needs, its rule, is registered under a number when a
parameter is first stepped; the tables are made when the operator first runs, and kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lopt.optim.torch_backend.step import Member, Scaled, Unit
from lopt.optim.triton_backend.step import FusedStep, find_step
from lopt.rules import Rule

BETWEEN_KEYS, BETWEEN_MEMBERS = ",", ";"
_numbers = itertools.count(1)
_rules: WeakValueDictionary[int, Rule] = WeakValueDictionary()
_steps: dict[int, list[FusedStep]] = {}


def register(rule: Rule) -> int:
    """A number for a rule that has a program; not 0."""
    number = next(_numbers)
    _rules[number] = rule
    for gone in [key for key in _steps if key not in _rules]:
        del _steps[gone]
    return number


def step_in_graph(
    number: int, units: Sequence[Unit], decays: Sequence[float], sanitize: bool, tally: Tensor, amp: Scaled | None
) -> None:
    """`FusedStep.step` of some units, as a node of the graph that is being traced.

    Args:
        number: of `register`; of a rule without `tensor_keys`.
        decays: weight decay of each unit.
        sanitize, tally, amp: see `FusedStep.step`.
    """
    members = [member for unit in units for member in unit.members]
    rates = [unit.group["lr"] for unit in units]
    in_tensors = any(isinstance(rate, Tensor) for rate in rates)
    torch.ops.lopt.fused_step(
        [member.p for member in members],
        [member.g for member in members],
        [x for member in members for x in member.state.values()],
        tally,
        [torch.as_tensor(rate).reshape(()) for rate in rates] if in_tensors else [],
        [] if in_tensors else [float(rate) for rate in rates],
        decays,
        [int(unit.group["maximize"]) for unit in units],
        [len(unit.members) for unit in units],
        BETWEEN_MEMBERS.join([BETWEEN_KEYS.join(member.state) for member in members]),
        None if amp is None else amp.unscale,
        None if amp is None else amp.found_inf,
        number,
        sanitize,
    )


@torch.library.custom_op("lopt::fused_step", mutates_args=("params", "states", "tally"))
def fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    tally: Tensor,
    rate_tensors: Sequence[Tensor],
    rates: Sequence[float],
    decays: Sequence[float],
    maximize: Sequence[int],
    counts: Sequence[int],
    keys: str,
    unscale: Tensor | None,
    found_inf: Tensor | None,
    number: int,
    sanitize: bool,
) -> None:
    """See `step_in_graph`; `keys` are the names of `states`, parameter by parameter."""
    values = iter(states)
    members = [
        Member("", p, g, {key: next(values) for key in names.split(BETWEEN_KEYS)}, None)
        for p, g, names in zip(params, grads, keys.split(BETWEEN_MEMBERS), strict=True)
    ]
    units, start = [], 0
    for i, count in enumerate(counts):
        rate = rate_tensors[i] if rate_tensors else rates[i]
        group = {"lr": rate, "weight_decay": decays[i], "maximize": bool(maximize[i])}
        units.append(Unit(members[start : start + count], group))
        start += count
    step = find_step(_steps.setdefault(number, []), _rules[number], units)
    amp = None if found_inf is None else Scaled(unscale, found_inf)
    step.step(units, None, sanitize, lambda unit: 1.0, tally, amp)


@fused_step.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned."""
