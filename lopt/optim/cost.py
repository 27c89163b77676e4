"""What a rule is going to cost on a user's model, and the line that says so where that is far more than AdamW's.

State is counted; time is measured, by `python -m bench step`, as a multiple of a step of `torch.optim.AdamW`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lopt.optim.options import ADAMW
from lopt.optim.parameter_names import list_names
from lopt.rules import Rule, find_layout

ADAMW_STEPS: Mapping[str, float] = MappingProxyType(
    {
        "lstm": 150,
        "rnnprop": 185,
        "linear": 3.9,
        "small_fc": 13,
        "mlp": 19,
        "velo": 8.5,
        "celo": 7.8,
        "celo_adam": 0.83,
        "celo2": 117,
        "celo2_base": 9.3,
        "hierarchical_rnn": 68,
        "star": 18,
        "base": 9,
    }
)
"""By rule: time of a step on a core of a CPU, in steps of AdamW, with default options and 9.46 million parameters, of
`base` with 108,000. Others have not been measured, nor has any on a GPU."""

MANY = 10
"""Times the parameters' own memory, or AdamW's time, above which a line is said."""

FEW = 10_000
"""Parameters up to which none is, as neither is felt there."""


def tell_cost(rule: Rule, groups: Iterable[Mapping[str, Any]], state_dtype: torch.dtype, stacklevel: int) -> None:
    """Warn where a rule's state takes more than `MANY` times the parameters' memory, or its step `MANY` AdamW steps.

    Args:
        rule: of the optimizer.
        groups: its `param_groups`, of which those of AdamW are left out.
        state_dtype: of what may be kept in another than float32.
        stacklevel: of the warning.
    """
    named = [
        (name, p)
        for group in groups
        if group["rule"] != ADAMW
        for name, p in zip(list_names(group), group["params"], strict=True)
    ]
    numbers = sum(p.numel() for _, p in named)
    if numbers <= FEW:
        return
    held, own = count_state(rule, named, state_dtype), sum(p.numel() * p.element_size() for _, p in named)
    on_cpu = all(p.device.type == "cpu" for _, p in named)
    time = ADAMW_STEPS.get(rule.name, 0.0) if on_cpu else 0.0
    told = [f"{held / numbers:.0f} bytes of state per parameter, {held / own:.0f} times its own"] * (held > MANY * own)
    told += [f"about {time:.0f} steps of AdamW in time for each of its own"] * (time > MANY)
    if told:
        halves = rule.compact_keys and state_dtype == torch.float32 and held > MANY * own
        advice = "Give large layers to AdamW (lopt.group_parameters)"
        if rule.name != "base":
            advice = "For models of this size and larger ones take the default rule, lopt-base"
        also = ", or halve the state by state_dtype=torch.bfloat16" if halves else ""
        warnings.warn(f"rule {rule.name!r} takes {' and '.join(told)}. {advice}{also}.", stacklevel=stacklevel)


def count_state(rule: Rule, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the state that a rule keeps of parameters; nothing is allocated.

    Args:
        named: names and parameters.
        dtype: of the accumulators that may be kept in it.
    """
    sizes: dict[tuple[Rule, tuple[int, ...]], int] = {}
    total = 0
    for name, p in named:
        shape = tuple(p.shape)
        own = rule.delegate(name, find_layout(shape)) or rule
        if (own, shape) not in sizes:
            with torch.device("meta"):
                acc = own.init_state({"": torch.empty(shape, dtype=torch.float32)}).accumulators[""]
            sizes[own, shape] = sum(
                a.numel() * (dtype.itemsize if key in own.compact_keys else a.element_size()) for key, a in acc.items()
            )
        total += sizes[own, shape]
    return total
