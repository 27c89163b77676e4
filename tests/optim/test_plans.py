"""The planned number of steps: one plan for rule and guard, after a resume too, and a warning beyond it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_cases import draw, list_warnings, step_with
from rule_cases import make_quick
from torch import Tensor, nn

import lopt
from lopt import LearnedOptimizer
from lopt.optim.report import Counts
from lopt.optim.units import STEP
from lopt.rules import RULES, Rule, State

COSINE = {"lr": 0.1, "schedule": "cosine"}
PLANNED = [name for name in RULES if RULES[name].needs_num_steps or RULES[name].open_ended]


def make_params(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(draw(i)) for i in range(count)]


# -- after loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [8, 1000], ids=["shorter", "longer"])
def test_schedule_goes_by_the_plan_of_the_optimizer_that_loads(plan: int) -> None:
    """The right value is the cosine in float64, step by step."""
    (p,) = make_params(1)
    saved = LearnedOptimizer([p], RULES["sgd"](**COSINE), num_steps=20)
    for step in range(5):
        step_with(saved, step)
    resumed = LearnedOptimizer([p], RULES["sgd"](**COSINE), num_steps=plan, lr=7.0)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.param_groups[0]["lr"] == 1.0  # as in torch, what is no plan is the saved one
    expected = p.detach().double()
    for step in range(5, 8):
        step_with(resumed, step)
        expected = expected - 0.1 * 0.5 * (1 + cos(pi * step / plan)) * draw(100 * step + 50).double()
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


def step_purely(rule: Rule, start: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], plan: int) -> list[Tensor]:
    """One more step by the rule's own `update` in float64, from an optimizer's parameters and their states."""
    names = [str(i) for i in range(len(start))]
    accumulators = [{key: x.double() for key, x in state.items() if key != STEP} for state in states]
    params = {name: p.double() for name, p in zip(names, start, strict=True)}
    grads = {name: draw(100 * 5 + i + 50).double() for i, name in enumerate(names)}
    state = State(states[0][STEP], dict(zip(names, accumulators, strict=True)))
    with torch.no_grad():
        loss = torch.tensor(1.0, dtype=torch.float64)
        new, _ = rule.double().update(grads, params, state, loss, torch.tensor(plan))
    return list(new.values())


@pytest.mark.parametrize("name", PLANNED)
def test_rule_steps_by_the_plan_of_the_optimizer_that_loads(name: str) -> None:
    """The right value is the rule's `update` in float64 with that plan, from the saved state."""
    params = make_params()
    saved = LearnedOptimizer(params, make_quick(name), num_steps=6)
    for step in range(5):
        step_with(saved, step)
    start = [p.detach().clone() for p in params]
    resumed = LearnedOptimizer(params, make_quick(name), num_steps=1000)
    resumed.load_state_dict(saved.state_dict())
    states = [{key: x.clone() for key, x in resumed.state[p].items()} for p in params]
    step_with(resumed, 5)
    right, wrong = (step_purely(make_quick(name), start, states, plan) for plan in (1000, 6))
    for p, a, b, before in zip(params, right, wrong, start, strict=True):
        error, rounding = float((p.detach() - a).abs().max()), 2**-23 * float(before.abs().max())
        assert error <= 1e-4 * float((a - before).abs().max()) + rounding
        assert error < 0.1 * float((a - b).abs().max())  # the plan matters here


def test_groups_keep_plans_of_their_own_when_they_load_and_take_the_saved_where_they_have_none() -> None:
    def make(plans: Sequence[int | None]) -> LearnedOptimizer:
        groups = [{"params": [p], "num_steps": plan} for p, plan in zip(make_params(3), plans, strict=True)]
        return LearnedOptimizer(groups, RULES["sgd"](lr=0.1), num_steps=5)

    saved, resumed = make([10, 20, 30]), make([10, 200, None])
    step_with(saved, 0)
    resumed.load_state_dict(saved.state_dict())
    assert [group["num_steps"] for group in resumed.param_groups] == [10, 200, 30]


@pytest.mark.parametrize(("planned", "returns"), [(12, 0), (1000, 1)])
def test_guard_goes_by_the_plan_of_the_optimizer_that_loads(planned: int, returns: int) -> None:
    """A probation begins only where it can be undone before the end: 8 steps before, with windows of 4."""
    options = {"window": 4, "max_window": 4, "cooldown": 1}
    (p,) = make_params(1)
    saved = LearnedOptimizer([p], RULES["sgd"](lr=0.0), num_steps=50, guard=options)
    step_with(saved, 0, loss=1.0)
    step_with(saved, 1, loss=float("nan"))  # AdamW's turn begins
    resumed = LearnedOptimizer([p], RULES["sgd"](lr=0.0), num_steps=planned, guard=options)
    resumed.load_state_dict(saved.state_dict())
    for step in range(2, 7):
        step_with(resumed, step)
    assert resumed.report().returns == returns
    assert resumed.guard is not None
    assert resumed.guard.num_steps == planned


def test_guard_goes_by_the_longest_plan_of_the_rules_groups() -> None:
    a, b, c, d = make_params(4)
    groups = [{"params": [a], "num_steps": 40}, {"params": [b]}, {"params": [c], "rule": "adamw", "num_steps": 900}]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](), num_steps=30, guard=True)
    step_with(optimizer, 0)
    assert optimizer.guard is not None
    assert optimizer.guard.num_steps == 40
    optimizer.add_param_group({"params": [d], "num_steps": 60})
    step_with(optimizer, 1)
    assert optimizer.guard.num_steps == 60


# -- beyond the plan ---------------------------------------------------------------------------------------------------

FOLLOWERS: dict[str, tuple[Rule, dict[str, Any], str | None]] = {
    "rule": (RULES["sgd"](**COSINE), {}, "rule 'sgd'"),
    "guard": (RULES["sgd"](), {"guard": True}, "the guard"),
    "both": (RULES["sgd"](**COSINE), {"guard": True}, "rule 'sgd' and the guard"),
    "none": (RULES["sgd"](), {}, None),
}


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_the_first_step_beyond_the_plan_warns_who_follows_it(kind: str) -> None:
    rule, options, who = FOLLOWERS[kind]
    optimizer = LearnedOptimizer(make_params(), rule, num_steps=3, **options)
    found = list_warnings(optimizer, range(6))
    assert list(found) == ([] if who is None else [3])
    assert all(f"beyond the plan of {who}, num_steps=3." in message for message in found.values())


def test_nothing_is_said_of_a_plan_that_nobody_has_made() -> None:
    optimizer = LearnedOptimizer(make_params(), RULES["sgd"](), guard=True)
    assert not list_warnings(optimizer, range(3))


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_steps_before_a_resume_count_in_the_plan(kind: str) -> None:
    rule, options, who = FOLLOWERS[kind]
    params = make_params()
    saved, resumed = (LearnedOptimizer(params, rule, num_steps=3, **options) for _ in range(2))
    assert not list_warnings(saved, range(2))
    resumed.load_state_dict(saved.state_dict())
    assert list(list_warnings(resumed, range(2, 5))) == ([] if who is None else [3])


def test_group_that_comes_late_is_beyond_its_plan_by_its_own_steps() -> None:
    a, b = make_params()
    optimizer = LearnedOptimizer([a], RULES["sgd"](**COSINE), num_steps=100)
    assert not list_warnings(optimizer, range(4))
    optimizer.add_param_group({"params": [b], "num_steps": 3})
    assert list(list_warnings(optimizer, range(4, 9))) == [7]
    assert int(optimizer.state[b][STEP]) == 5


def test_group_without_gradients_stands_still_in_its_plan() -> None:
    a, b = make_params()
    groups = [{"params": [a]}, {"params": [b], "num_steps": 2}]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](**COSINE), num_steps=100)
    for step in range(3):
        a.grad = draw(step)
        optimizer.step()
    assert list(list_warnings(optimizer, range(4))) == [2]


def test_groups_that_adamw_steps_follow_no_plan() -> None:
    a, b = make_params()
    groups = [{"params": [a], "num_steps": 2, "rule": "adamw"}, {"params": [b]}]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](**COSINE), num_steps=100)
    assert not list_warnings(optimizer, range(4))


@pytest.mark.parametrize("guard", [False, True])
def test_warning_beyond_the_horizon_advises_the_guard_only_where_there_is_none(guard: bool) -> None:
    optimizer = LearnedOptimizer(make_params(), RULES["sgd"](), guard=guard)
    optimizer.counts = Counts(optimizer.rule, horizon=2, guarded=guard)
    found = list_warnings(optimizer, range(5), about="horizon")
    assert list(found) == [2]
    assert ("guard=True" in found[2]) is not guard


def test_rules_that_may_run_open_are_not_bound_to_the_lengths_of_their_training(tmp_path: Path) -> None:
    """Their schedules are of the run: only others warn where a run is longer than those of the card."""
    for name in ("base", "adam"):
        path = lopt.save(make_quick(name), tmp_path / f"{name}.safetensors", {"longest_run": 1})
        p = nn.Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2)
        optimizer = LearnedOptimizer([p], path, num_steps=9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(loss=1.0)  # type: ignore[call-arg]
        assert any("on which rule 'adam' was trained" in str(w.message) for w in caught) == (name == "adam")
