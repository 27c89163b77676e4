"""The state of an optimizer's parameters: made before the first step, and put back from what was saved.

A saved state is checked whole before anything changes: what belongs to which parameter, whether it was made by the same
rule, whether it fits, and whether it is one that an optimizer may have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lopt.core.foreign_text import make_printable
from lopt.core.random import derive_seeds
from lopt.optim.guard.state import GuardState
from lopt.optim.guard.steps import GUARD_SQUARES, GUARD_START, init_guard
from lopt.optim.options import check_group, check_rule, find_direction
from lopt.optim.parameter_names import list_names
from lopt.optim.units import SEED, STEP, import_sharding, is_sharded
from lopt.rules import Rule, find_layout
from lopt.rules.stages import PLACE

Group = dict[str, Any]
FindRule = Callable[[str, Tensor, Group], Rule]
"""(name, parameter, group) -> the rule that steps it."""
MakeState = Callable[[Rule, str, Tensor], Mapping[str, Tensor]]
"""(rule, name, parameter) -> its state before the first step; of the "meta" device where only shapes are asked for."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
MAX_STEP = 1 << 53
MAX_NAME = 80  # characters of a name in an error


def init_state(
    rule: Rule,
    p: Tensor,
    seed: int | None,
    guarded: bool,
    dtype: torch.dtype = torch.float32,
    groups: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Tensor]:
    """A parameter's state before its first step.

    Args:
        dtype: of the rule's `compact_keys`; all else is in fp32.
        seed: of its stochastic rounding, if it is rounded so.
        guarded: with what the guard keeps.
        groups: the optimizer's, for rules that ask for the parameter's place among all.
    Returns:
        The int64 counter "step" `[]`, "seed" likewise, the rule's accumulators, and tensors named "guard_*".
    """
    place = find_place(p, groups) if PLACE in rule.tensor_keys else 0
    p = p.detach()
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
    if PLACE in rule.tensor_keys:
        state[PLACE].fill_(place)
    return state | {key: state[key].to(dtype) for key in rule.compact_keys if key in state}


def derive_seed(name: str, p: Tensor, groups: Iterable[Mapping[str, Any]]) -> int:
    """The seed of a parameter's stochastic rounding: equal in every run, another one for every parameter.

    Args:
        groups: the optimizer's; where the parameter has no name, its place among all tells it apart.
    """
    return int(derive_seeds(0, f"stochastic rounding of {name or find_place(p, groups)}"))


def find_place(p: Tensor, groups: Iterable[Mapping[str, Any]]) -> int:
    """A parameter's number among all of an optimizer's, in the order in which they were given; 0 for a stranger."""
    params = (q for group in groups for q in group["params"])
    return next((i for i, q in enumerate(params) if q is p), 0)


def check_parts(state_dict: Any) -> None:
    """Refuse what is no optimizer's state at all, so that the checks of its content need not doubt its kind.

    Raises:
        ValueError: the message says which part is of a wrong kind.
    """
    groups, states = (
        state_dict.get(key) if isinstance(state_dict, Mapping) else None for key in ("param_groups", "state")
    )
    if not (isinstance(groups, (list, tuple)) and isinstance(states, Mapping)):
        raise ValueError("expected an optimizer's state_dict(), a dictionary with 'state' and 'param_groups'")
    keys: list[Any] = []
    for i, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not (isinstance(params, (list, tuple)) and all(isinstance(key, (int, str)) for key in params)):
            raise ValueError(f"group {i} of the state has no list of numbered 'params'")
        names = group.get("param_names", [""] * len(params))
        fine = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not fine or len(names) != len(params):
            raise ValueError(f"group {i} of the state has 'param_names' that do not name its {len(params)} parameters")
        keys += params
    unknown = sorted(states.keys() - set(keys), key=str)
    if unknown or len(set(keys)) < len(keys):
        what = f"state of {_quote(unknown[0])}, which is in no group" if unknown else "a parameter twice in its groups"
        raise ValueError(f"the state is damaged: it has {what}")
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of parameter {_quote(key)} must be a dictionary, got a {type(state).__name__}")


def _quote(key: Any) -> str:
    """A foreign key or name, as an error may show it."""
    return make_printable(repr(key), MAX_NAME)


def fill_groups(saved_groups: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The saved groups, with the optimizer's own value of every option that they lack.

    So a state that was saved before an option existed can still be loaded. A group too many stays, for torch to refuse.
    """
    filled = [
        {key: group[key] for key in group if key not in ("rule", "param_names")} | {"cool_down": None} | saved
        for saved, group in zip(saved_groups, groups, strict=False)
    ]
    return filled + list(saved_groups[len(filled) :])


def match_names(saved: Group, group: Mapping[str, Any]) -> None:
    """Reorder a saved group's parameters as the optimizer's, in place, where both have names.

    So a model whose layers are created in another order finds the state of each again, and so does one that is wrapped
    otherwise (compiled, DDP, FSDP).

    Raises:
        ValueError: they have other names.
    """
    if not ("param_names" in saved and "param_names" in group):
        return
    saved_names, names = list_names(saved), list_names(group)
    if sorted(saved_names) != sorted(names):
        missing = sorted(set(names) - set(saved_names)) or sorted(set(saved_names) - set(names)) or names
        raise ValueError(
            f"the state's group has other parameters than this optimizer's: {_quote(missing[0])} is in one of them "
            "only. Construct both optimizers with the same groups."
        )
    # torch hands states out by position: the saved keys are put where the parameters of their names are here. Of equal
    # names the first is the first.
    keys = [key for _, key in sorted(zip(saved_names, saved["params"], strict=True), key=itemgetter(0))]
    places = sorted(range(len(names)), key=names.__getitem__)
    saved["params"] = [key for _, key in sorted(zip(places, keys, strict=True))]
    saved["param_names"] = list(group["param_names"])


def check_states(
    saved: Group, group: Group, states: Mapping[Any, Mapping[str, Any]], find_rule: FindRule, make_state: MakeState
) -> None:
    """Compare a group's saved states with those that its parameters would have before their first step.

    Args:
        saved, group: the saved group, in the order of the optimizer's.
        states: by the keys in `saved["params"]`; parameters without one pass.
    Raises:
        ValueError: other entries, other shapes, or values that no optimizer writes; the message names the parameter.
    """
    # On the meta device a state takes no memory, and a rule's constructor is asked rather than described twice.
    names = list_names(saved if "param_names" in saved else group)
    for key, name, p in zip(saved["params"], names, group["params"], strict=False):
        rule, whole = find_rule(name, p, group), torch.empty(p.shape, dtype=p.dtype, device="meta")
        state, fresh = states.get(key, {}), make_state(rule, name, whole)
        if state:
            _check_shapes(repr(name or key), p.shape, state, fresh, rule.name)
            _check_values(repr(name or key), state, fresh, (*rule.square_keys, *GUARD_SQUARES))


def _check_shapes(
    parameter: str, shape: Sequence[int], state: Mapping[str, Any], fresh: Mapping[str, Tensor], rule: str
) -> None:
    saved, expected = (
        {key: list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for key, x in entries.items()}
        for entries in (state, fresh)
    )
    wrong = sorted((key for key in expected.keys() | saved.keys() if expected.get(key) != saved.get(key)), key=str)
    if wrong:
        theirs, ours = (shapes.get(wrong[0], "absent") for shapes in (saved, expected))
        raise ValueError(
            f"the state of parameter {parameter} does not fit it: its {_quote(wrong[0])} is {theirs}, but {ours} where "
            f"rule {rule!r} steps shape {list(shape)}. Construct both optimizers with the same options and parameters "
            "in the same order, and with names in both or in neither."
        )


def _check_values(
    parameter: str, state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], squares: Sequence[str]
) -> None:
    """Refuse numbers that no optimizer leaves behind: a step with them would fail halfway, or spoil the parameters.

    Args:
        state, fresh: of the same entries and shapes.
        squares: entries of which no number is below 0.
    """
    for key, expected in fresh.items():
        whole = not expected.is_floating_point()
        value = import_sharding().to_local(state[key]) if is_sharded(state[key]) else state[key]
        if value.dtype not in (INTEGERS if whole else FLOATS) or value.is_meta or value.layout != torch.strided:
            fine, found = False, f"{value.dtype} on {value.device}"
        elif whole:
            number = int(value)
            last = int(state[STEP]) if key == GUARD_START else MAX_STEP
            fine, found = key == SEED or 0 <= number <= last, str(number)
        else:  # in the dtype that it will have here
            largest = float(torch.linalg.vector_norm(value.detach(), float("inf"))) if value.numel() else 0.0
            fine, found = largest <= torch.finfo(expected.dtype).max, "not finite"
            if fine and key in squares and value.numel():
                fine, found = bool(value.min() >= 0), "negative somewhere"
        if not fine:
            raise ValueError(
                f"the state of parameter {parameter} is damaged: its {key!r} is {found}, as no optimizer writes. "
                "Load an earlier one."
            )


def match_state(
    state_dict: Mapping[str, Any],
    groups: Sequence[Group],
    rule: Rule,
    find_rule: FindRule,
    make_state: MakeState,
    guarded: bool,
) -> dict[str, Any]:
    """A saved state as it fits an optimizer: options filled in, parameters in the optimizer's order, values checked.

    Args:
        groups: the optimizer's `param_groups`.
        rule: the optimizer's.
        guarded: it has a guard.
    Returns:
        A new state dict with the saved tensors; the number of groups is left for torch to compare.
    Raises:
        ValueError: it does not fit, or no optimizer has written it.
    """
    # Nothing is changed here: a state that does not fit in its last group leaves the optimizer as it was.
    check_parts(state_dict)
    saved_groups = fill_groups(state_dict["param_groups"], groups)
    for saved, group in zip(saved_groups, groups, strict=False):
        check_rule(saved, expected=group["rule"])
        check_group(saved, rule, group["rule"])
        # A run is resumed to go on for as long as is planned now; the saved plan may be that of a shorter one.
        # An end that `cool_down` has set here is none that the user has constructed the optimizer with.
        if group["num_steps"] is not None and group["cool_down"] is None:
            saved.update(num_steps=group["num_steps"], cool_down=None)
        match_names(saved, group)
        check_states(saved, group, state_dict["state"], find_rule, make_state)
        if saved["guard_memory"] is not None:
            GuardState.from_numbers(saved["guard_memory"])
    if guarded:
        find_direction(saved_groups)
    return {**state_dict, "param_groups": saved_groups}


def read_states(
    saved: Mapping[str, Any], groups: Sequence[Group], find_rule: FindRule, make_state: MakeState
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Every parameter that has a saved state, with its own copy of it, on its device and in the dtypes of a fresh one.

    torch's own loading would change the dtypes to that of the parameter.

    Args:
        saved: a state dict that was checked, whose groups are as the optimizer's.
    """
    for saved_group, group in zip(saved["param_groups"], groups, strict=True):
        for key, name, p in zip(saved_group["params"], list_names(group), group["params"], strict=True):
            state = saved["state"].get(key)
            if state is None:
                continue
            fresh = make_state(find_rule(name, p, group), name, torch.empty(p.shape, dtype=p.dtype, device="meta"))
            yield (
                p,
                {
                    entry: value.detach().to(p.device, fresh[entry].dtype, copy=True).contiguous()
                    for entry, value in state.items()
                },
            )
