"""torch's own optimizer test utilities, and the checks of its test_optim.py, on learned rules.

The inputs and the errors come from `torch.testing._internal.common_optimizers`; the checks are ours, of the same ideas.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from contract_cases import (
    CASES,
    Case,
    assert_close,
    assert_moved,
    assert_same,
    clone,
    copy_state,
    every_case,
    every_rule,
    make_params,
    run_steps,
    set_grads,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lopt
from lopt import LearnedOptimizer

pytest.importorskip("expecttest", reason="torch's test utilities need it")

from torch.testing._internal import common_optimizers as utilities

ROUNDING = 1e-4  # of the movement
SHAPES = [(6, 5), (5,), (6, 5), (), (4, 3, 2, 2), (5,), (6, 5)]  # equal shapes are what is stepped together


def list_inputs(case: Case) -> list[Any]:
    """The inputs that torch tries AdamW and SGD with, as far as the optimizer has these options.

    AdamW refuses capturable on the CPU; for ours it is an option as all others.
    """
    accepted = set(inspect.signature(LearnedOptimizer if case.learned else torch.optim.AdamW).parameters)
    device = "cuda" if case.learned else "cpu"
    inputs = utilities.optim_inputs_func_adamw(device) + utilities.optim_inputs_func_sgd(device)
    return [given for given in inputs if set(given.kwargs) <= accepted]


every_input = pytest.mark.parametrize(
    ("case", "given"),
    [
        pytest.param(case, given, id=f"{case.name}-{index} {given.desc}")
        for case in CASES
        for index, given in enumerate(list_inputs(case))
    ],
)
every_error = pytest.mark.parametrize(
    ("case", "given"),
    [
        pytest.param(case, given, id=f"{case.name}-{given.optimizer_error_input.desc}")
        for case in CASES
        for given in utilities.get_error_inputs_for_all_optims("cpu", torch.float32)
    ],
)


def make(case: Case, given: Any, params: Any, **options: Any) -> Optimizer:
    """With torch's options, some of which are tensors that schedulers would change."""
    return case.make(params, **copy.deepcopy(given.kwargs), **options)


def test_torch_has_inputs_for_everything_that_we_offer() -> None:
    """Or the tests below are fewer than they look."""
    found = {key for given in list_inputs(CASES[1]) for key in given.kwargs}
    assert {"lr", "weight_decay", "maximize", "capturable"} <= found


# -- errors ----------------------------------------------------------------------------------------


@every_error
def test_errors_are_torchs(case: Case, given: Any) -> None:
    """Type and message, as torch checks them for its own."""
    params, options = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
    params = make_params() if params is None else params
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            case.make(params, **options)
    else:
        assert given.error_on is utilities.OptimizerErrorEnum.CONSTRUCTION_ERROR
        with pytest.raises(given.error_type, match=given.error_regex):
            case.make(params, **options)


# -- options ---------------------------------------------------------------------------------------


@every_input
def test_options_become_defaults_of_every_group(case: Case, given: Any) -> None:
    a, b, c = make_params([(6, 5), (5,), ()])
    optimizer = make(case, given, [{"params": a}, {"params": b, "weight_decay": 0.25}])
    optimizer.add_param_group({"params": c})
    for name, value in given.kwargs.items():
        assert bool(torch.all(torch.as_tensor(optimizer.defaults[name]) == torch.as_tensor(value)))
        for group in (optimizer.param_groups[0], optimizer.param_groups[2]):
            assert group[name] is optimizer.defaults[name]
    assert optimizer.param_groups[1]["weight_decay"] == 0.25
    assert all(group.keys() == {*optimizer.defaults, "params"} for group in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:rule 'velo' reads the training loss")
@every_input
def test_all_together_equals_one_at_a_time(case: Case, given: Any) -> None:
    """torch's comparison of its foreach with its for-loop implementation: equal shapes, other dtypes in between."""
    if not case.learned and isinstance(given.kwargs.get("lr"), Tensor):
        pytest.skip("torch refuses a tensor as lr with foreach")
    runs, states = [], []
    for foreach in (False, True):
        params = make_params(SHAPES) + make_params(SHAPES[:3], seed=20, dtype=torch.float64)
        optimizer = make(case, given, params, foreach=foreach)
        assert optimizer.param_groups[0]["foreach"] is foreach
        for step in range(4):
            set_grads(params, step)
            if step == 2:
                params[2].grad = None
            case.step(optimizer)
        runs.append(clone(params))
        states.append(copy_state(optimizer)["state"])
    start = make_params(SHAPES) + make_params(SHAPES[:3], seed=20, dtype=torch.float64)
    assert_close(runs[1], runs[0], start, ROUNDING)
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        assert values.keys() == states[1][key].keys()
        for name, value in values.items():
            torch.testing.assert_close(states[1][key][name], value, rtol=1e-3, atol=1e-6)


@every_input
def test_default_of_foreach_is_one_of_the_two(case: Case, given: Any) -> None:
    runs = []
    for options in ({}, {"foreach": None}, {"foreach": True}):
        if not case.learned and options.get("foreach") and isinstance(given.kwargs.get("lr"), Tensor):
            continue
        params = make_params(SHAPES)
        run_steps(case, make(case, given, params, **options), params, 2)
        runs.append(clone(params))
    assert_same(runs[1], runs[0])
    if case.learned:
        assert_same(runs[2], runs[0])


@every_input
def test_lr_as_a_tensor_equals_the_number(case: Case, given: Any) -> None:
    runs = []
    for wrap in (float, torch.tensor):
        params = make_params(SHAPES)
        options = copy.deepcopy(given.kwargs)
        options["lr"] = wrap(float(options.get("lr", case.lr)))
        run_steps(case, case.make(params, **options), params, 3)
        runs.append(clone(params))
    assert_close(runs[1], runs[0], make_params(SHAPES), 1e-5)


# -- state -----------------------------------------------------------------------------------------


@every_input
def test_state_dict_is_deterministic_and_loads_to_an_equal_one(case: Case, given: Any) -> None:
    runs = []
    for _ in range(2):
        params = make_params(SHAPES)
        optimizer = make(case, given, params)
        run_steps(case, optimizer, params, 2)
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    assert_same(other.state_dict(), optimizer.state_dict())
    fresh = make(case, given, others)
    fresh.load_state_dict(copy_state(optimizer))
    assert_same(fresh.state_dict(), optimizer.state_dict())
    for each, tensors in ((optimizer, params), (fresh, others)):
        run_steps(case, each, tensors, 2, first=2)
    assert_same(clone(others), clone(params))


@every_case
@pytest.mark.parametrize("names", [(True, True), (True, False), (False, True)], ids=str)
def test_state_loads_with_and_without_names(case: Case, names: tuple[bool, bool]) -> None:
    runs = []
    for named in names:
        params = make_params()
        optimizer = case.make([(f"p{i}", p) for i, p in enumerate(params)] if named else params)
        run_steps(case, optimizer, params, 2)
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    before = other.param_groups[0].get("param_names")
    other.load_state_dict(copy_state(optimizer))
    assert other.param_groups[0].get("param_names") in (before, optimizer.param_groups[0].get("param_names"))
    for tensors, each in runs:
        run_steps(case, each, tensors, 1, first=2)
    assert_same(clone(others), clone(params))


@every_case
@pytest.mark.parametrize("key", ["maximize", "foreach", "capturable"])
def test_state_from_before_an_option_existed_loads(case: Case, key: str) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    state = copy_state(optimizer)
    for group in state["param_groups"]:
        del group[key]
    optimizer.load_state_dict(state)
    before = clone(params)
    run_steps(case, optimizer, params, 1, first=1)
    assert_moved(params, before)
    assert not optimizer.param_groups[0][key]


# -- gradients that are nothing --------------------------------------------------------------------


@every_input
def test_empty_tensors_among_others_change_nothing_of_them(case: Case, given: Any) -> None:
    """VeLO's scheduler looks at all tensors that have a gradient: there the others only stay finite."""
    runs = []
    for shapes in ([(6, 5)], [(6, 5), (0,), (0, 5)]):
        params = make_params(shapes)
        run_steps(case, make(case, given, params), params, 2)
        runs.append(params[0].detach())
    assert bool(torch.isfinite(runs[1]).all())
    if case.name != "velo":
        assert_close(runs[1:], runs[:1], make_params([(6, 5)]), ROUNDING)


@every_input
def test_step_without_gradients_does_nothing(case: Case, given: Any) -> None:
    params = make_params(SHAPES)
    optimizer = make(case, given, params)
    before = clone(params)
    case.step(optimizer)
    for p in params:
        p.requires_grad_(False)
    case.step(optimizer)
    assert_same(clone(params), before)
    assert not optimizer.state


# -- hooks -----------------------------------------------------------------------------------------


@every_case
def test_step_hooks_run_in_order_around_the_step(case: Case) -> None:
    params, seen = make_params(), []
    optimizer = case.make(params)
    before = clone(params)

    def note(name: str) -> Any:
        def hook(found: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert found is optimizer
            moved = not torch.equal(params[0], before[0])
            seen.append((name, moved))

        return hook

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        run_steps(case, optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("global pre", False), ("pre", False), ("post", True), ("global post", True)]
    run_steps(case, optimizer, params, 1)
    assert len(seen) == 4


@every_case
def test_pre_hook_may_replace_the_arguments_of_step(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    set_grads(params, 0)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: 7.0), {}))
    assert optimizer.step() == 7.0


@every_case
def test_state_dict_hooks_see_and_replace(case: Case) -> None:
    params, seen = make_params(), []
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    optimizer.register_state_dict_pre_hook(lambda found: seen.append(found))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "param_groups": state["param_groups"][:1]})
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state) or None)
    state = optimizer.state_dict()
    assert seen[0] is optimizer
    assert seen[1] is state


@every_case
def test_load_hooks_see_and_replace(case: Case) -> None:
    params, seen = make_params(), []
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)

    def rename(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state)
        changed["param_groups"][0]["lr"] = 0.125
        return changed

    other = case.make(make_params())
    hooks = len(other._optimizer_load_state_dict_pre_hooks), len(other._optimizer_load_state_dict_post_hooks)
    handle = other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda found: seen.append((found, len(found.state))))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.125
    assert seen == [(other, len(params))]
    handle.remove()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == case.lr
    assert len(other._optimizer_load_state_dict_pre_hooks) == hooks[0]
    assert len(other._optimizer_load_state_dict_post_hooks) == hooks[1] + 1


# -- labels ----------------------------------------------------------------------------------------


@every_case
def test_profiler_shows_step_and_zero_grad_by_class(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.step(optimizer)
        optimizer.zero_grad()
    names, kind = {event.key for event in profile.key_averages()}, type(optimizer).__name__
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= names


# -- it trains -------------------------------------------------------------------------------------


def fall(optimizer: Optimizer, weight: Tensor, scheduled: bool) -> tuple[float, float]:
    """First and last loss of a linear regression, under schedulers as torch's test has them."""
    x, target = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.ones(10)
    rates = torch.optim.lr_scheduler
    schedulers = [rates.StepLR(optimizer, 30, 0.9), rates.ReduceLROnPlateau(optimizer)] if scheduled else []
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ (weight - target).to(x.dtype)).square().mean()
        loss.backward()
        return loss

    for _ in range(100):
        losses.append(optimizer.step(closure).item())  # type: ignore[union-attr]
        for scheduler in schedulers:
            scheduler.step(losses[-1]) if isinstance(scheduler, rates.ReduceLROnPlateau) else scheduler.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", ["AdamW", *lopt.list_rules()])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["one at a time", "together"])
def test_loss_falls(name: str, scheduled: bool, dtype: torch.dtype, foreach: bool) -> None:
    """With the trained rules: untrained ones go anywhere."""
    weight = torch.nn.Parameter(torch.zeros(10, dtype=dtype))
    if name == "AdamW":
        optimizer: Optimizer = torch.optim.AdamW([weight], lr=0.05, foreach=foreach)
    else:
        options = {"foreach": False} if not foreach else {}
        optimizer = LearnedOptimizer([weight], name, **options)
    first, last = fall(optimizer, weight, scheduled)
    assert last < 0.3 * first


@every_rule
def test_no_step_warns_when_it_has_what_it_needs(case: Case) -> None:
    params = make_params(SHAPES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = case.make(params)
        run_steps(case, optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        repr(copy.deepcopy(optimizer))
