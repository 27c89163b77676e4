"""The state of an optimizer's parameters: made before the first step, and put back from what was saved.

A saved state is checked whole before anything changes: what belongs to which parameter, whether it was made by the same
rule, and whether it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.optim.guard.steps import init_guard
from lopt.optim.options import check_rule
from lopt.optim.units import SEED, STEP, import_sharding, is_sharded
from lopt.rules import Rule, find_layout

Group = dict[str, Any]
FindRule = Callable[[str, Tensor, Group], Rule]
"""(name, parameter, group) -> the rule that steps it."""


def init_state(
    rule: Rule, p: Tensor, seed: int | None, guarded: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A parameter's state before its first step.

    Args:
        dtype: of the rule's `compact_keys`; all else is in fp32.
        seed: of its stochastic rounding, if it is rounded so.
        guarded: with what the guard keeps.
    Returns:
        The int64 counter "step" `[]`, "seed" likewise, the rule's accumulators, and tensors named "guard_*".
    """
    state = {STEP: torch.zeros((), dtype=torch.int64, device=p.device)}
    if seed is not None:
        state[SEED] = torch.full((), seed, dtype=torch.int64, device=p.device)
    # Every process makes the state of its part; what a rule reads of the parameter, it reads in fp32.
    layout = find_layout(tuple(p.shape))
    if is_sharded(p):
        init = import_sharding().init_parts
        state |= init(lambda part, x: rule.init_accumulators(part.float(), x), p, rule.tensor_keys, rule.line_keys)
        state |= init(lambda part, x: init_guard(part), p, (), ()) if guarded else {}
    else:
        state |= rule.init_state({"": p.float()}).accumulators[""]
        state |= init_guard(p.reshape(layout.shape)) if guarded else {}
    return state | {key: state[key].to(dtype) for key in rule.compact_keys}


def derive_seed(name: str, p: Tensor, groups: Iterable[Mapping[str, Any]]) -> int:
    """The seed of a parameter's stochastic rounding: equal in every run, another one for every parameter.

    Args:
        groups: the optimizer's; where the parameter has no name, its place among all tells it apart.
    """
    params = [q for group in groups for q in group["params"]]
    place = next((i for i, q in enumerate(params) if q is p), 0)
    return int(derive_seeds(0, f"stochastic rounding of {name or place}"))


def fill_groups(saved_groups: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The saved groups, with the optimizer's own value of every option that they lack, and its own plan if it has one.

    So a state that was saved before an option existed can still be loaded. A group too many stays, for torch to refuse.
    """
    # A run is resumed to go on for as long as is planned now; the saved plan may be that of a shorter one.
    filled = [
        {key: group[key] for key in group if key not in ("rule", "param_names")}
        | saved
        | ({} if group["num_steps"] is None else {"num_steps": group["num_steps"]})
        for saved, group in zip(saved_groups, groups, strict=False)
    ]
    return filled + list(saved_groups[len(filled) :])


def match_names(saved: Group, group: Mapping[str, Any]) -> None:
    """Reorder a saved group's parameters as the optimizer's, in place, where both have names.

    So a model whose layers are created in another order finds the state of each again.

    Raises:
        ValueError: they have other names.
    """
    if not ("param_names" in saved and "param_names" in group):
        return
    saved_names, names = saved["param_names"], group["param_names"]
    if sorted(saved_names) != sorted(names):
        missing = sorted(set(names) - set(saved_names)) or sorted(set(saved_names) - set(names))
        raise ValueError(
            f"the state's group has other parameters than this optimizer's: {missing[0]!r} is in one of them only. "
            "Construct both optimizers with the same groups."
        )
    # torch hands states out by position: the saved keys are put where the parameters of their names are here.
    keys = dict(zip(saved_names, saved["params"], strict=True))
    saved["params"], saved["param_names"] = [keys[name] for name in names], list(names)


def check_states(
    saved: Group,
    group: Group,
    states: Mapping[Any, Mapping[str, Any]],
    find_rule: FindRule,
    make_state: Callable[[Rule, str, Tensor], Mapping[str, Tensor]],
) -> None:
    """Compare a group's saved states with those that its parameters would have before their first step.

    Args:
        saved, group: the saved group, in the order of the optimizer's.
        states: by the keys in `saved["params"]`; parameters without one pass.
        make_state: a state for a rule, a name and a parameter, which here are of the "meta" device: shapes only.
    Raises:
        ValueError: other entries or other shapes; the message names the parameter.
    """
    # On the meta device a state takes no memory, and a rule's constructor is asked rather than described twice.
    names = saved.get("param_names", list_names(group))
    for key, name, p in zip(saved["params"], names, group["params"], strict=False):
        rule, whole = find_rule(name, p, group), torch.empty(p.shape, dtype=p.dtype, device="meta")
        _check_shapes(repr(name or key), p.shape, states.get(key, {}), make_state(rule, name, whole), rule.name)


def _check_shapes(
    parameter: str, shape: Sequence[int], state: Mapping[str, Any], fresh: Mapping[str, Tensor], rule: str
) -> None:
    saved, expected = (
        {key: list(value.shape) for key, value in tensors.items() if isinstance(value, Tensor)}
        for tensors in (state, fresh)
    )
    wrong = sorted(key for key in expected.keys() | saved.keys() if expected.get(key) != saved.get(key))
    if saved and wrong:
        theirs, ours = (shapes.get(wrong[0], "absent") for shapes in (saved, expected))
        raise ValueError(
            f"the state of parameter {parameter} does not fit it: its {wrong[0]!r} is {theirs}, but {ours} where rule "
            f"{rule!r} steps shape {list(shape)}. Construct both optimizers with the same options and parameters in "
            "the same order, and with names in both or in neither."
        )


def match_state(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    find_rule: FindRule,
    make_state: Callable[[Rule, str, Tensor], Mapping[str, Tensor]],
) -> dict[str, Any]:
    """A saved state as it fits an optimizer: options filled in, parameters in the optimizer's order, shapes compared.

    Args:
        groups: the optimizer's `param_groups`.
        find_rule, make_state: as for `check_states`.
    Returns:
        A new state dict with the saved tensors; the number of groups is left for torch to compare.
    Raises:
        ValueError: it does not fit; see `check_rule`, `match_names` and `check_states`.
    """
    # Nothing is changed here: a state that does not fit in its last group leaves the optimizer as it was.
    saved_groups = fill_groups(state_dict["param_groups"], groups)
    for saved, group in zip(saved_groups, groups, strict=False):
        check_rule(saved, expected=group["rule"])
        match_names(saved, group)
        check_states(saved, group, state_dict["state"], find_rule, make_state)
    return {**state_dict, "param_groups": saved_groups}


def read_states(
    saved: Mapping[str, Any], groups: Sequence[Group], find_rule: FindRule, dtype: torch.dtype
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Every parameter that has a saved state, with its own copy of it, on its device.

    Args:
        saved: a state dict that was checked, whose groups are as the optimizer's.
        dtype: of the rules' `compact_keys`; all else keeps its dtype, which torch's own loading would change to that of
            the parameter.
    """
    for saved_group, group in zip(saved["param_groups"], groups, strict=True):
        for key, name, p in zip(saved_group["params"], list_names(group), group["params"], strict=True):
            state = saved["state"].get(key)
            if state is not None:
                dtypes = dict.fromkeys(find_rule(name, p, group).compact_keys, dtype)
                yield p, {entry: _copy_to(p.device, value, dtypes.get(entry)) for entry, value in state.items()}


def _copy_to(device: torch.device, value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor's own copy on `device`, in `dtype` or its own; anything else as it is."""
    return value.detach().to(device, dtype, copy=True).contiguous() if isinstance(value, Tensor) else value


def list_names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters, in order, as the user gave them; "" for each where there are none.

    Rules may route by them (`Rule.delegate`), and the order of parameters in a step and in saved states goes by them.
    """
    return list(group.get("param_names", [""] * len(group["params"])))
