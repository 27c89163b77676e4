"""The fused step as one operator of torch, so that `torch.compile(optimizer.step)` keeps it whole in its graph.

A graph is a list of operators on tensors and numbers: it can hold neither a rule nor a dictionary of state. The rule
and the names of its state stand in `dispatch.REGISTERED` under a number, before the graph is traced; the options of
groups travel in one list of floats and one of integers, whose places have names here. Tables are made when the
operator first runs, and kept with the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.optim.triton_backend.dispatch import REGISTERED, RuleKernels
from lopt.optim.units import Member, Scaled, Unit

# Of the integers: first these, then for each unit as many as `UNIT`, then for each parameter an index of `state_names`.
NUMBER, SANITIZE, UNITS, HEAD = 0, 1, 2, 3
COUNT, MAXIMIZE, UNIT = 0, 1, 2
# Of the floats, for each unit: its learning rate (0 where rates are in tensors), its weight decay, and AdamW's numbers.
RATE, DECAY, BETA1, BETA2, EPS, RATES = 0, 1, 2, 3, 4, 5


def step_in_graph(
    kernels: RuleKernels,
    units: Sequence[Unit],
    decays: Sequence[float],
    sanitize: bool,
    tally: Tensor,
    amp: Scaled | None,
) -> None:
    """`RuleKernels.step` of some units, as a node of the graph that is being traced.

    Args:
        kernels: of a rule without `tensor_keys`, so without a loss; it has learnt the names of all members' states.
        decays: weight decay of each unit.
        sanitize, tally, amp: as for `FusedStep.step`.
    """
    # Rates in tensors stay variables of the graph; the operator takes all of them so if one is.
    members = [member for unit in units for member in unit.members]
    rates = [unit.groups[0]["lr"] for unit in units]
    in_tensors = any(isinstance(rate, Tensor) for rate in rates)
    # torch allows an operator lists of one plain type each, no dictionaries and no objects: hence the two lists.
    integers = [kernels.number, int(sanitize), len(units)]
    floats: list[float] = []
    for unit, rate, decay in zip(units, rates, decays, strict=True):
        integers += [len(unit.members), int(unit.groups[0]["maximize"])]
        (beta1, beta2), eps = unit.groups[0]["betas"], unit.groups[0]["eps"]
        floats += [0.0 if in_tensors else float(rate), decay, float(beta1), float(beta2), float(eps)]
    integers += [kernels.state_names.index(tuple(member.state)) for member in members]
    torch.ops.lopt.fused_step(
        [member.p for member in members],
        [member.g for member in members],
        [x for member in members for x in member.state.values()],
        tally,
        [torch.as_tensor(rate, dtype=torch.float32).reshape(()) for rate in rates] if in_tensors else [],
        None if amp is None else amp.unscale,
        None if amp is None else amp.found_inf,
        floats,
        integers,
    )


@torch.library.custom_op("lopt::fused_step", mutates_args=("params", "states", "tally"))
def fused_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    tally: Tensor,
    rates: Sequence[Tensor],
    unscale: Tensor | None,
    found_inf: Tensor | None,
    floats: Sequence[float],
    integers: Sequence[int],
) -> None:
    """The operator that `step_in_graph` calls: puts units together again out of plain lists, and steps them.

    Args:
        params, grads: one of each per parameter, unit by unit.
        states: all entries of all parameters' states, which are changed in place like `params` and `tally`.
        rates: learning rates `[]` of the units, where one of them is a tensor; else none.
        unscale, found_inf: of `Scaled`, if there is a gradient scaler.
        floats, integers: see the constants of this module.
    """
    # Members have their state's tensors under their names again, which say where the kernels read and write what.
    kernels, count = REGISTERED[integers[NUMBER]], integers[UNITS]
    names = [kernels.state_names[index] for index in integers[HEAD + UNIT * count :]]
    values = iter(states)
    members = [
        Member("", p, g, {key: next(values) for key in keys}, None)
        for p, g, keys in zip(params, grads, names, strict=True)
    ]
    # Groups have what the kernels read of one; weight decay came multiplied, so that its scale here is 1.
    units, start = [], 0
    for i in range(count):
        options, numbers = integers[HEAD + UNIT * i :], floats[RATES * i :]
        lr = rates[i] if rates else numbers[RATE]
        group: dict[str, Any] = {"lr": lr, "weight_decay": numbers[DECAY], "maximize": bool(options[MAXIMIZE])}
        group |= {"betas": (numbers[BETA1], numbers[BETA2]), "eps": numbers[EPS]}
        units.append(Unit(members[start : start + options[COUNT]], [group]))
        start += options[COUNT]
    amp = None if found_inf is None else Scaled(unscale, found_inf)
    kernels.step(units, None, bool(integers[SANITIZE]), lambda unit: 1.0, tally, amp)


@fused_step.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned."""
