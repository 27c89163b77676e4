"""The contract of a torch optimizer: its state, what is saved of it, and how it goes on after loading."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_cases import (
    LEARNED,
    Case,
    assert_moved,
    assert_same,
    clone,
    copy_state,
    every_case,
    every_rule,
    is_same,
    make_params,
    run_steps,
)
from torch import Tensor, nn
from torch.optim import Optimizer

Run = tuple[list[nn.Parameter], Optimizer]
PLAIN = (Tensor, str, int, float, bool, type(None))


def make_run(case: Case, fresh: bool = True) -> Run:
    """Two groups of tensors, one of which never has a gradient."""
    params = make_params() if fresh else make_params(seed=40)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": case.lr / 2}, {"params": make_params([(2,)])}]
    return params, case.make(groups, weight_decay=0.01)


def advance(case: Case, run: Run, steps: int, first: int = 0) -> None:
    run_steps(case, run[1], run[0], steps, first)


def copy_params(run: Run, source: Run) -> None:
    with torch.no_grad():
        for p, q in zip(run[0], source[0], strict=True):
            p.copy_(q)


def walk(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in walk(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in walk(item)]
    return [value]


def through_file(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- what it is ------------------------------------------------------------------------------------


@every_case
def test_state_is_keyed_by_parameters_and_holds_plain_values_only(case: Case) -> None:
    """DCP drops other top-level keys, fails on others in `state`, and flattens only tensors and numbers in there."""
    run = make_run(case)
    advance(case, run, 2)
    assert set(run[1].state) == set(run[0])
    state = run[1].state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert set(state["state"]) == set(range(len(run[0])))
    entries = walk(state["state"])
    assert all(type(value) in (Tensor, int, float) for value in entries)
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in entries)
    assert all(isinstance(values["step"], Tensor) and values["step"].shape == () for values in state["state"].values())
    groups = walk(state["param_groups"])
    assert all(type(value) in PLAIN for value in groups)
    assert not any(isinstance(value, Tensor) and value.numel() > 1 for value in groups)


@every_case
def test_state_dict_is_the_same_every_time_and_survives_a_safe_file(case: Case) -> None:
    run = make_run(case)
    for steps in (0, 2):
        advance(case, run, steps)
        state = run[1].state_dict()
        assert_same(through_file(state), state)
        assert_same(run[1].state_dict(), state)


@every_rule
def test_state_is_fp32_on_the_parameters_device_whatever_their_dtype(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        params = make_params(dtype=dtype)
        optimizer = case.make(params)
        run_steps(case, optimizer, params, 1)
        values = walk(dict(optimizer.state))
        assert {value.dtype for value in values if value.is_floating_point()} == {torch.float32}
        assert {value.device for value in values} == {params[0].device}


@every_rule
def test_groups_name_the_rule_and_its_fingerprint(case: Case) -> None:
    _, optimizer = make_run(case)
    _, same = make_run(case)
    identities = {group["rule"] for group in (*optimizer.param_groups, *same.state_dict()["param_groups"])}
    assert len(identities) == 1
    name, _, digest = identities.pop().partition("-")
    assert name == case.rule
    assert len(digest) >= 16


# -- resuming --------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("before", [0, 3])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(case: Case, before: int) -> None:
    """With a changed lr, and a parameter that has no state; also from before the first step."""
    run, resumed = make_run(case), make_run(case, fresh=False)
    advance(case, run, before)
    run[1].param_groups[0]["lr"] = case.lr * 0.7
    copy_params(resumed, run)
    resumed[1].load_state_dict(through_file(run[1].state_dict()))
    assert bool(resumed[1].state) == bool(before)
    assert resumed[1].param_groups[0]["lr"] == case.lr * 0.7
    advance(case, run, 3, first=before)
    advance(case, resumed, 3, first=before)
    assert_same(clone(resumed[0]), clone(run[0]))
    assert_same(copy_state(resumed[1]), copy_state(run[1]))


@every_case
def test_saving_and_loading_in_mid_run_changes_nothing(case: Case) -> None:
    """accelerate does so in `prepare`."""
    plain, shaken = make_run(case), make_run(case)
    for step in range(3):
        shaken[1].load_state_dict(shaken[1].state_dict())
        for run in (plain, shaken):
            advance(case, run, 1, first=step)
    assert_same(clone(shaken[0]), clone(plain[0]))


@every_case
def test_loading_leaves_its_source_alone_and_takes_it_by_keyword(case: Case) -> None:
    run = make_run(case)
    advance(case, run, 2)
    source = copy_state(run[1])
    expected = copy.deepcopy(source)
    finals = []
    for _ in range(2):
        other = make_run(case)
        other[1].load_state_dict(state_dict=copy.deepcopy(source))
        other[1].load_state_dict(state_dict=source)
        assert_same(source, expected)
        finals.append(copy_state(other[1]))
    assert_same(finals, [expected, expected])


@every_rule
def test_loaded_state_shares_no_memory_with_its_source(case: Case) -> None:
    run, other = make_run(case), make_run(case)
    advance(case, run, 2)
    expected = copy_state(run[1])
    other[1].load_state_dict(run[1].state_dict())
    advance(case, other, 2, first=2)
    assert_same(copy_state(run[1]), expected)


@every_rule
def test_names_match_states_whatever_the_order(case: Case) -> None:
    named = [(f"layer{i}", p) for i, p in enumerate(make_params())]
    optimizer = case.make(named)
    run_steps(case, optimizer, [p for _, p in named], 3)
    others = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    resumed = case.make(others[::-1])
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["param_names"] == [name for name, _ in others[::-1]]
    for params, each in ((named, optimizer), (others, resumed)):
        run_steps(case, each, [p for _, p in params], 3, first=3)
    assert_same(clone(p for _, p in others), clone(p for _, p in named))


@every_rule
def test_names_match_states_of_equal_shape_and_missing_states(case: Case) -> None:
    """Where a mistake would not show in shapes, and one of them has never been stepped."""
    shapes = [(6, 5)] * 3
    named = list(zip("abc", make_params(shapes), strict=True))
    optimizer = case.make(named)
    run_steps(case, optimizer, [p for _, p in named[:2]], 2)
    others = dict(zip("bca", make_params(shapes), strict=True))
    resumed = case.make(list(others.items()))
    resumed.load_state_dict(optimizer.state_dict())
    assert others["c"] not in resumed.state
    for name, p in named[:2]:
        assert_same(dict(resumed.state[others[name]]), dict(optimizer.state[p]))


@every_case
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_state_goes_on_under_another_dtype_of_the_parameters(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    params = make_params(dtype=dtypes[0])
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 2)
    others = [nn.Parameter(p.detach().to(dtypes[1])) for p in params]
    before = clone(others)
    other = case.make(others)
    other.load_state_dict(through_file(optimizer.state_dict()))
    if case.learned:
        assert_same(copy_state(other)["state"], copy_state(optimizer)["state"])  # not rounded to the parameters' dtype
    run_steps(case, other, others, 2, first=2)
    assert_moved(others, before)
    assert all(p.dtype == dtypes[1] for p in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_rule
def test_state_goes_on_on_another_device(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 2)
    others = [nn.Parameter(p.detach().cuda()) for p in params]
    other = case.make(others)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert all(value.is_cuda for value in walk(dict(other.state)))
    for p in others:
        p.grad = torch.ones_like(p)
    before = clone(others)
    case.step(other)
    assert_moved(others, before)


# -- what is refused -------------------------------------------------------------------------------


@every_case
def test_state_of_other_groups_or_sizes_is_refused(case: Case) -> None:
    run = make_run(case)
    advance(case, run, 1)
    one_group, more = case.make(make_params()), case.make(make_params(seed=7) + make_params())
    for other in (one_group, more):
        with pytest.raises(ValueError, match="group"):
            run[1].load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="group"):
            more.load_state_dict(run[1].state_dict())


@every_rule
def test_state_of_another_shape_is_refused_and_nothing_changes(case: Case) -> None:
    params, others = make_params([(6, 5), (5,)]), make_params([(5, 6), (5,)])
    optimizer, other = case.make(params), case.make(others)
    run_steps(case, optimizer, params, 1)
    run_steps(case, other, others, 2)
    before = copy_state(optimizer)
    with pytest.raises(ValueError, match=r"does not fit.*\[6, 5\]"):
        optimizer.load_state_dict(other.state_dict())
    assert_same(copy_state(optimizer), before)


@every_rule
@pytest.mark.parametrize("difference", ["meta-weights", "rule", "optimizer"])
def test_state_of_another_rule_is_refused_naming_both(case: Case, difference: str) -> None:
    run = make_run(case)
    advance(case, run, 1)
    before = copy_state(run[1])
    groups = [{"params": group["params"]} for group in make_run(case)[1].param_groups]
    if difference == "optimizer":
        other: Optimizer = torch.optim.AdamW(groups)
    else:
        like = case if difference == "meta-weights" else next(c for c in LEARNED if c.rule != case.rule)
        config = like.config | ({"seed": 3} if difference == "meta-weights" else {})
        other = Case(like.name, like.rule, config, options=like.options).make(groups)
    theirs = other.param_groups[0].get("rule", "another kind of optimizer")
    with pytest.raises(ValueError, match=f"{run[1].param_groups[0]['rule']}.*{theirs}"):
        run[1].load_state_dict(other.state_dict())
    assert_same(copy_state(run[1]), before)


# -- copies ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("before", [0, 2])
def test_copy_goes_on_to_the_bit_and_on_its_own(case: Case, how: str, before: int) -> None:
    run = make_run(case)
    advance(case, run, before)
    copied = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
    advance(case, run, 2, first=before)
    assert not is_same(clone(copied[0]), clone(run[0]))
    advance(case, copied, 2, first=before)
    assert_same(clone(copied[0]), clone(run[0]))
    assert_same(copy_state(copied[1]), copy_state(run[1]))
    public = {name for name in vars(run[1]) if not name.startswith("_")}
    assert public <= set(vars(copied[1]))
    assert repr(copied[1]) == repr(run[1])
