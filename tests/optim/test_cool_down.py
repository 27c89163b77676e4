"""Runs of which the end is not known at first: open, then cooled down, beside planned ones, and resumed in between."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from math import cos, pi
from typing import Any

import pytest
import torch
from plan_cases import draw, list_warnings, step_with
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.optim.units import STEP
from lopt.rules import RULES, Rule
from lopt.rules.building_blocks.open_schedule import DECAY_POWER, DECAY_STEPS

SIZE = 0.03  # of a matrix's step; a tensor's initial size allows for more


def make_base() -> Rule:
    return RULES["base"](size=SIZE, depth=1.0, decay=1e-12, init_std=0.0)


def make_params(count: int = 1) -> list[nn.Parameter]:
    """In float64, so that sizes of steps can be read off."""
    return [nn.Parameter(draw(i, (3, 2)).double()) for i in range(count)]


def follow(optimizer: LearnedOptimizer, steps: Sequence[int]) -> list[list[float]]:
    """The root mean square of every parameter's steps, over `SIZE`, and over the number of matrices."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sizes: list[list[float]] = []
    for step in steps:
        before = [p.detach().clone() for p in params]
        step_with(optimizer, step)
        moved = [p.detach() - q for p, q in zip(params, before, strict=True)]
        sizes.append([float(x.square().mean().sqrt()) * len(params) / SIZE for x in moved])
    return sizes


def follow_one(optimizer: LearnedOptimizer, steps: Sequence[int]) -> list[float]:
    return [sizes[0] for sizes in follow(optimizer, steps)]


def decay(t: float) -> float:
    return float((1 + t / DECAY_STEPS) ** -DECAY_POWER)


def half_cosine(x: float) -> float:
    return (1 + cos(pi * x)) / 2


def near(expected: Sequence[Any]) -> Any:
    return pytest.approx(list(expected), rel=2e-6, abs=1e-7)


# -- the size of every step --------------------------------------------------------------------------------------------


def test_open_run_decays_slowly_and_cools_down_along_half_a_cosine_to_rest() -> None:
    params = make_params()
    optimizer = LearnedOptimizer(params, make_base())
    assert follow_one(optimizer, range(40)) == near(decay(t) for t in range(40))
    optimizer.cool_down(8)
    assert follow_one(optimizer, range(40, 48)) == near(decay(40) * half_cosine(i / 8) for i in range(8))
    end = params[0].detach().clone()
    assert follow_one(optimizer, range(48, 51)) == near([0, 0, 0])
    torch.testing.assert_close(params[0].detach(), end, rtol=0, atol=1e-9)


@pytest.mark.parametrize("left", [1, 3, 30])
def test_second_cool_down_stretches_or_shortens_what_is_left_of_the_cosine(left: int) -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    follow(optimizer, range(10))
    optimizer.cool_down(9)
    follow(optimizer, range(10, 13))
    optimizer.cool_down(left)  # a third of the cosine is done
    shares = [1 / 3 + 2 / 3 * i / left for i in range(left)] + [1, 1]
    assert follow_one(optimizer, range(13, 15 + left)) == near(decay(10) * half_cosine(x) for x in shares)


def test_cool_down_before_the_first_step_is_a_plan() -> None:
    planned, cooled = (make_params() for _ in range(2))
    optimizer = LearnedOptimizer(cooled, make_base())
    optimizer.cool_down(6)
    follow(optimizer, range(5))
    follow(LearnedOptimizer(planned, make_base(), num_steps=6), range(5))
    assert torch.equal(planned[0], cooled[0])


def test_as_many_steps_as_are_left_change_nothing() -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    follow(optimizer, range(4))
    optimizer.cool_down(7)
    follow(optimizer, range(4, 6))
    group = dict(optimizer.param_groups[0])
    optimizer.cool_down(5)
    assert optimizer.param_groups[0] == group


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    follow(optimizer, range(4))
    optimizer.cool_down(4)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    assert follow_one(optimizer, [4]) == [0]
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    assert follow_one(optimizer, range(4, 8)) == near(decay(4) * half_cosine(i / 4) for i in range(4))


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [None, False])
def test_open_groups_cool_down_while_planned_ones_follow_their_plans(foreach: bool | None) -> None:
    a, b, c, d = make_params(4)
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "num_steps": 20}, {"params": [c, d]}]
    optimizer = LearnedOptimizer(groups, make_base(), foreach=foreach)
    expected = [[decay(t), half_cosine(t / 20), decay(t), decay(t)] for t in range(5)]
    for sizes, right in zip(follow(optimizer, range(5)), expected, strict=True):
        assert sizes == near(right)
    optimizer.cool_down(4)
    assert [group["num_steps"] for group in optimizer.param_groups] == [9, 20, 9]
    for t, sizes in zip(range(5, 10), follow(optimizer, range(5, 10)), strict=True):
        cooled = decay(5) * half_cosine((t - 5) / 4) if t < 9 else 0
        assert sizes == near([cooled, half_cosine(t / 20), cooled, cooled])


def test_tensor_that_had_no_gradient_at_times_ends_with_the_run() -> None:
    a, b = make_params(2)
    optimizer = LearnedOptimizer([{"params": [a]}, {"params": [b]}], make_base())
    for step in range(6):
        a.grad, b.grad = draw(step).double(), draw(step + 9).double() if step % 2 else None
        optimizer.step()
    assert int(optimizer.state[b][STEP]) == 3
    optimizer.cool_down(4)
    for i, sizes in enumerate(follow(optimizer, range(6, 11))):
        assert sizes == near([decay(6) * half_cosine(min(1, i / 4))] * 2)


def test_groups_of_adamw_keep_their_rate() -> None:
    a, b = make_params(2)
    optimizer = LearnedOptimizer([{"params": [a]}, {"params": [b], "rule": "adamw"}], make_base())
    optimizer.cool_down(1)
    step_with(optimizer, 0)
    before = [p.detach().clone() for p in (a, b)]
    step_with(optimizer, 1)
    assert torch.equal(a, before[0])
    assert not torch.equal(b, before[1])


def test_guard_goes_by_the_end_of_the_cool_down() -> None:
    optimizer = LearnedOptimizer(make_params(), make_base(), guard=True)
    step_with(optimizer, 0)
    assert optimizer.guard is not None
    assert optimizer.guard.num_steps is None
    optimizer.cool_down(5)
    step_with(optimizer, 1)
    assert optimizer.guard.num_steps == 6


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [3, 5, 8])  # open; in a cool-down; in one that was called twice
@pytest.mark.parametrize("busy", [False, True])
def test_run_goes_on_bitwise_where_it_was_saved(saved_at: int, busy: bool) -> None:
    """Whatever the loading optimizer did before: a cool-down of its own is no plan that it was made with."""

    def act(optimizer: LearnedOptimizer, steps: Sequence[int]) -> None:
        for step in steps:
            if step in (4, 7):
                optimizer.cool_down(6)
            step_with(optimizer, step)

    def make(params: Sequence[Tensor]) -> LearnedOptimizer:
        a, b, c = params
        groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "num_steps": 11}, {"params": [c]}]
        return LearnedOptimizer(groups, make_base())

    params = make_params(3)
    optimizer = make(params)
    act(optimizer, range(saved_at))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    if busy:
        resumed.cool_down(2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    act(optimizer, range(saved_at, 12))
    act(resumed, range(saved_at, 12))
    assert all(map(torch.equal, params, copies))
    assert [g["cool_down"] for g in optimizer.param_groups] == [g["cool_down"] for g in resumed.param_groups]


def test_plan_of_the_optimizer_that_loads_replaces_a_cool_down() -> None:
    params = make_params()
    saved = LearnedOptimizer(params, make_base())
    follow(saved, range(4))
    saved.cool_down(3)
    resumed = LearnedOptimizer(params, make_base(), num_steps=40)
    resumed.load_state_dict(saved.state_dict())
    assert follow_one(resumed, range(4, 9)) == near(half_cosine(t / 40) for t in range(4, 9))


# -- warnings and errors -----------------------------------------------------------------------------------------------


def test_first_step_beyond_the_cool_down_warns_and_an_open_run_never_does() -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    assert not list_warnings(optimizer, range(3))
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()  # skipped: it is no step of the cool-down's, nor of those before
    optimizer.cool_down(2)
    found = list_warnings(optimizer, range(3, 8))
    assert list(found) == [5]
    assert "beyond the plan of rule 'base', num_steps=5." in found[5]


@pytest.mark.parametrize("steps", [0, -1, 2.0, "3", None])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    with pytest.raises(ValueError, match=r"whole number of steps, at least 1, got"):
        optimizer.cool_down(steps)


@pytest.mark.parametrize("name", ["adam", "lstm"])
def test_rule_without_a_schedule_says_so(name: str) -> None:
    optimizer = LearnedOptimizer(make_params(), RULES[name]())
    with pytest.raises(ValueError, match=f"rule '{name}' has no schedule .* lower lr"):
        optimizer.cool_down(5)


@pytest.mark.parametrize("rule", [make_base(), RULES["sgd"](schedule="cosine")], ids=["base", "sgd"])
def test_plans_that_users_have_made_are_not_replaced(rule: Rule) -> None:
    optimizer = LearnedOptimizer(make_params(), rule, num_steps=9)
    with pytest.raises(ValueError, match=r"have plans already \(num_steps: 9\)"):
        optimizer.cool_down(5)


def test_run_that_has_ended_cannot_be_cooled_down_again() -> None:
    optimizer = LearnedOptimizer(make_params(), make_base())
    optimizer.cool_down(2)
    follow(optimizer, range(2))
    groups = deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    with pytest.raises(ValueError, match="has ended at step 2"):
        optimizer.cool_down(5)
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
