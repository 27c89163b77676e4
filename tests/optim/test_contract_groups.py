"""The contract of a torch optimizer: construction, options, groups, names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from contract_cases import Case, assert_moved, assert_same, clone, every_case, every_rule, make_params, run_steps
from torch import nn
from torch.optim import Optimizer

from lopt import LearnedOptimizer
from lopt.rules import RULES

BAD_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("lr", -1.0, "lr|learning rate"),
    ("lr", float("nan"), "lr|learning rate"),
    ("weight_decay", -0.5, "weight_decay"),
    ("weight_decay", float("nan"), "weight_decay"),
    ("betas", (1.0, 0.9), "beta"),
    ("betas", (0.9, -0.1), "beta"),
    ("eps", -1e-8, "eps"),
)
BAD_VALUES_OF_OURS: tuple[tuple[str, Any, str], ...] = (
    ("lr", float("inf"), "lr"),
    ("num_steps", 0, "num_steps"),
    ("num_steps", -3, "num_steps"),
    ("num_steps", float("nan"), "num_steps"),
    ("betas", (0.9, float("nan")), "betas"),
    ("eps", float("nan"), "eps"),
)
GROUP_KEYS = {
    *("params", "lr", "weight_decay", "num_steps", "cool_down", "rule"),
    *("betas", "eps", "maximize", "foreach", "capturable", "guard_memory"),
}


@every_case
def test_is_an_optimizer_of_a_generator_and_holds_only_the_users_tensors(case: Case) -> None:
    params = make_params()
    optimizer = case.make(p for p in params)
    assert isinstance(optimizer, Optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in params]
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"] == case.lr


@every_case
def test_no_parameters_are_refused(case: Case) -> None:
    for empty in ([], (p for p in [])):
        with pytest.raises(ValueError, match="empty parameter list"):
            case.make(empty)


@every_case
@pytest.mark.parametrize("kind", ["non-leaf", "not a tensor", "set in a group"])
def test_what_is_no_list_of_leaf_tensors_is_refused(case: Case, kind: str) -> None:
    p = make_params()[0]
    params: Any = {"non-leaf": [p * 2], "not a tensor": [1.0], "set in a group": [{"params": {p}}]}[kind]
    with pytest.raises(ValueError if kind == "non-leaf" else TypeError):
        case.make(params)


@every_case
@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES, ids=str)
def test_values_out_of_range_are_refused_by_name(case: Case, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        case.make(make_params(), **{name: value})


@every_rule
@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES + BAD_VALUES_OF_OURS, ids=str)
def test_values_out_of_range_are_refused_in_groups_and_change_nothing(
    case: Case, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        case.make(make_params(), **{name: value})
    with pytest.raises(ValueError, match=message):
        case.make([{"params": make_params(), name: value}])
    optimizer = case.make(make_params())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_params(), name: value})
    assert len(optimizer.param_groups) == 1


@every_rule
@pytest.mark.parametrize("option", ["nonfinite", "backend"])
def test_unknown_choice_lists_the_known_ones(case: Case, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}.*(skip|torch).*someday"):
        case.make(make_params(), **{option: "someday"})


@every_case
def test_unknown_option_is_refused(case: Case) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        case.make(make_params(), learning_rate=0.1)


@every_rule
@pytest.mark.parametrize("flag", ["fused", "differentiable"])
def test_what_is_not_offered_is_refused_not_ignored(case: Case, flag: str) -> None:
    with pytest.raises(TypeError, match=flag):
        case.make(make_params(), **{flag: True})


# -- groups ----------------------------------------------------------------------------------------


@every_case
def test_groups_have_rates_and_decays_of_their_own(case: Case) -> None:
    still, usual, slow, decayed = (make_params([(6, 5)])[0] for _ in range(4))
    groups: list[dict[str, Any]] = [
        {"params": [still], "lr": 0.0},
        {"params": [usual]},
        {"params": [slow], "lr": case.lr / 2},
        {"params": [decayed], "weight_decay": 5.0},
    ]
    optimizer = case.make(groups)
    start = still.detach().clone()
    grad = torch.full((6, 5), 0.3)
    for p in (still, usual, slow, decayed):
        p.grad = grad.clone()
    case.step(optimizer)
    assert_same(still.detach(), start)
    torch.testing.assert_close(slow - start, (usual - start) / 2, rtol=1e-2, atol=1e-6)
    assert not torch.equal(decayed, usual)
    assert bool(((decayed - usual) * start <= 0).all())


@every_case
def test_late_group_has_all_options_and_moves(case: Case) -> None:
    params, (late,) = make_params(), make_params([(3,)])
    optimizer = case.make(params[:2])
    run_steps(case, optimizer, params[:2], 2)
    optimizer.add_param_group({"params": iter(params[2:])})
    optimizer.add_param_group({"params": late, "lr": case.lr / 2})
    first, *others = (group.keys() for group in optimizer.param_groups)
    assert all(keys == first for keys in others)
    params.append(late)
    before = clone(params)
    run_steps(case, optimizer, params, 1)
    assert_moved(params, before)
    assert optimizer.param_groups[2]["lr"] == case.lr / 2
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 3


@every_rule
def test_groups_of_the_rule_and_of_adamw_have_the_same_keys(case: Case) -> None:
    a, b = make_params([(6, 5), (6, 5)])
    optimizer = case.make([{"params": [a]}, {"params": [b], "rule": "adamw"}])
    optimizer.add_param_group({"params": make_params([(2,)]), "rule": "adamw"})
    assert all(set(group) == GROUP_KEYS for group in optimizer.param_groups)
    assert set(optimizer.defaults) == GROUP_KEYS - {"params"}


@every_case
def test_group_remembers_keys_that_are_not_the_optimizers(case: Case) -> None:
    """timm puts `lr_scale` there, trainers put names."""
    params = make_params()
    groups = [{"params": params[:1], "lr_scale": 0.1, "name": "head"}, {"params": params[1:], "lr_scale": 1.0}]
    optimizer = case.make(groups)
    for group in optimizer.param_groups:
        group["lr"] = case.lr * group["lr_scale"]
    before = clone(params)
    run_steps(case, optimizer, params, 1)
    assert_moved(params, before)
    state = optimizer.state_dict()
    assert [group["lr_scale"] for group in state["param_groups"]] == [0.1, 1.0]
    other = case.make([{"params": make_params()[:1]}, {"params": make_params()[1:]}])
    other.load_state_dict(state)
    assert other.param_groups[0]["name"] == "head"


@every_case
def test_names_are_in_groups_and_state_dict(case: Case) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = case.make(model[0].named_parameters())
    optimizer.add_param_group({"params": model[1].named_parameters()})
    for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
        assert [group["param_names"] for group in groups] == [["weight", "bias"], ["weight", "bias"]]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": make_params()})


# -- what clients do to an optimizer ---------------------------------------------------------------


@every_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_sets_none_or_zero(case: Case, set_to_none: bool) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


@every_case
def test_zero_grad_has_the_argument_that_accelerate_looks_for(case: Case) -> None:
    optimizer = case.make(make_params())
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    assert next(iter(inspect.signature(optimizer.step).parameters)) == "closure"


@every_case
def test_state_that_was_cleared_is_made_again(case: Case) -> None:
    runs = []
    for steps in (0, 3):
        params = make_params()
        optimizer = case.make(params)
        run_steps(case, optimizer, params, steps)
        with torch.no_grad():
            for p, fresh in zip(params, make_params(), strict=True):
                p.copy_(fresh)
        optimizer.state.clear()
        run_steps(case, optimizer, params, 2)
        runs.append(params)
    assert_same(*runs)


@every_case
def test_parameters_swapped_in_groups_are_stepped(case: Case) -> None:
    """As accelerate and fully_shard do."""
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    others = make_params(seed=20)
    optimizer.param_groups[0]["params"] = list(others)
    before, untouched = clone(others), clone(params)
    run_steps(case, optimizer, others, 2)
    assert_moved(others, before)
    assert_same(clone(params), untouched)


@every_case
def test_repr_lists_groups_and_options_and_stays_short(case: Case) -> None:
    params = [*make_params(), nn.Parameter(torch.ones(100, 100))]
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:], "lr": 0.125}])
    run_steps(case, optimizer, params, 1)
    text = repr(optimizer)
    assert type(optimizer).__name__ in text
    assert all(part in text for part in ("Parameter Group 0", "Parameter Group 1", "lr: 0.125", "weight_decay"))
    assert len(text) < 2000
    if case.learned:
        assert f"{case.rule}-" in text


@every_rule
def test_backend_names_what_runs_and_why(case: Case) -> None:
    optimizer = case.make(make_params())
    assert isinstance(optimizer, LearnedOptimizer)
    name, reason = optimizer.backend
    assert name in ("torch", "triton")
    assert optimizer.backend.name == name
    assert reason == optimizer.backend.reason != ""
    assert case.make(make_params(), backend="torch").backend.name == "torch"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "no"}, "guard must be True, False, GuardOptions"),
        ({"guard": {"clips": 3}}, "guard must be .* got {'clips': 3}"),
        ({"guard": {"clip": 0.0}}, "guard option clip must be"),
        ({"num_steps": 1.5}, "num_steps must be at least 1 and whole"),
        ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
        ({"lr": None}, "lr must be finite"),
        ({"eps": "x"}, "eps must be finite"),
        ({"betas": 0.9}, "betas must be two numbers"),
    ],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([nn.Parameter(torch.ones(1))], RULES["sgd"](), **options)


def test_guard_takes_a_dictionary_of_its_options() -> None:
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))], RULES["sgd"](), guard={"clip": 3.0})
    assert optimizer.guard is not None
    assert optimizer.guard.options.clip == 3.0
