"""The contract of a torch optimizer: learning-rate schedulers and averaging of weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import (
    CONTROL,
    LEARNED,
    Case,
    assert_close,
    assert_moved,
    assert_same,
    clone,
    compute_loss,
    copy_state,
    every_case,
    make_model,
    make_params,
    run_steps,
)
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from lopt import LearnedOptimizer
from lopt.rules import RULES

STEPS = 8
PEAK = 2.0  # of the schedulers that set the rate themselves, in units of the case's rate

Make = Callable[[Any, float], Any]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o, _: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o, _: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o, _: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
    "ConstantLR": lambda o, _: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o, _: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o, _: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o, _: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=2.0),
    "CosineAnnealingLR": lambda o, _: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o, lr: lr_scheduler.CyclicLR(o, 0.1 * lr, PEAK * lr, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o, lr: lr_scheduler.OneCycleLR(o, PEAK * lr, total_steps=STEPS + 1, cycle_momentum=True),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ReduceLROnPlateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o, lr: swa_utils.SWALR(o, swa_lr=0.05 * lr, anneal_epochs=4),
}

every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} == set(SCHEDULERS)


def read_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What schedulers set."""
    groups = optimizer.param_groups
    return [{"lr": float(g["lr"])} | {key: g[key] for key in ("betas",) if key in g} for g in groups]


def follow(case: Case, name: str, optimizer: Optimizer, params: list[Any], steps: int = STEPS) -> list[Any]:
    """Train under a scheduler; the options of every step."""
    scheduler, options = SCHEDULERS[name](optimizer, case.lr), []
    for step in range(steps):
        options.append(read_options(optimizer))
        run_steps(case, optimizer, params, 1, first=step)
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    return options


@every_case
@every_scheduler
def test_scheduler_sets_the_rates_that_it_sets_for_adamw_and_steps_follow_them(case: Case, name: str) -> None:
    params, others, control = make_params(), make_params(), make_params()
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:], "lr": case.lr / 2}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = follow(case, name, optimizer, params)
        like = CONTROL.make([{"params": control[:2]}, {"params": control[2:], "lr": CONTROL.lr / 2}])
        expected = follow(CONTROL, name, like, control)
    for ours, theirs in zip(options, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["lr"] / case.lr == pytest.approx(b["lr"] / CONTROL.lr, rel=1e-6)
    assert len({round(option[0]["lr"] / case.lr, 9) for option in options}) > 1
    by_hand = case.make([{"params": others[:2]}, {"params": others[2:]}])
    for step, option in enumerate(options):
        for group, values in zip(by_hand.param_groups, option, strict=True):
            group.update(values)
        run_steps(case, by_hand, others, 1, first=step)
    assert_same(clone(params), clone(others))


@every_case
@every_scheduler
def test_scheduler_fills_a_rate_that_is_a_tensor(case: Case, name: str) -> None:
    params, others = make_params(), make_params()
    rate = torch.tensor(case.lr, dtype=torch.float64)
    optimizer, other = case.make(params), case.make(others, lr=rate)
    options, tensors = follow(case, name, optimizer, params), follow(case, name, other, others)
    assert other.param_groups[0]["lr"] is rate
    for a, b in zip(options, tensors, strict=True):
        assert b[0]["lr"] == pytest.approx(a[0]["lr"], rel=1e-5)
    assert_close(others, params, make_params(), 1e-4)


@every_case
@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingWarmRestarts", "SequentialLR", "ReduceLROnPlateau"])
def test_optimizer_and_scheduler_resume_exactly(case: Case, name: str) -> None:
    runs = []
    for interrupted in (False, True):
        params = make_params()
        optimizer = case.make(params)
        scheduler = SCHEDULERS[name](optimizer, case.lr)
        for step in range(STEPS):
            if interrupted and step == 4:
                states = copy_state(optimizer), copy.deepcopy(scheduler.state_dict())
                optimizer = case.make(params)
                scheduler = SCHEDULERS[name](optimizer, case.lr)
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            run_steps(case, optimizer, params, 1, first=step)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        runs.append((clone(params), read_options(optimizer)))
    assert_same(*runs)


@pytest.mark.parametrize("case", LEARNED, ids=lambda case: case.name)
def test_momentum_that_a_scheduler_cycles_is_adamws_and_not_the_rules(case: Case) -> None:
    """`betas` are an option of groups with rule="adamw"; the rule's own decays are meta-weights."""
    params, others = make_params(), make_params()
    optimizer, other = case.make(params), case.make(others, betas=(0.5, 0.6))
    run_steps(case, optimizer, params, 2)
    run_steps(case, other, others, 2)
    own = [i for i, p in enumerate(params) if case.rule != "celo2" or p.ndim > 1]  # celo2 gives the rest to AdamW
    assert_same([params[i].detach() for i in own], [others[i].detach() for i in own])


# -- averaging -------------------------------------------------------------------------------------


@every_case
def test_averaged_model_is_the_mean_of_the_path(case: Case) -> None:
    model = make_model()
    optimizer = case.make(model.parameters())
    averaged = swa_utils.AveragedModel(model)
    smoothed = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    scheduler = swa_utils.SWALR(optimizer, swa_lr=case.lr / 2, anneal_epochs=2)
    path = []
    for step in range(4):
        optimizer.zero_grad()
        compute_loss(model, step).backward()
        case.step(optimizer)
        scheduler.step()
        averaged.update_parameters(model)
        smoothed.update_parameters(model)
        path.append(clone(model.parameters()))
    means = [torch.stack(values).mean(0) for values in zip(*path, strict=True)]
    ema = path[0]
    for values in path[1:]:
        ema = [0.5 * a + 0.5 * b for a, b in zip(ema, values, strict=True)]
    for mine, expected in ((averaged, means), (smoothed, ema)):
        for p, mean in zip(mine.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), mean, rtol=1e-5, atol=1e-6)
    assert_moved(averaged.module.parameters(), path[-1])


@every_case
def test_training_goes_on_from_averaged_weights(case: Case) -> None:
    """Weights are copied into the same parameters, as at the end of SWA."""
    model = make_model()
    optimizer = case.make(model.parameters())
    averaged = swa_utils.AveragedModel(model)
    for step in range(3):
        optimizer.zero_grad()
        compute_loss(model, step).backward()
        case.step(optimizer)
        averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())
    before = clone(model.parameters())
    compute_loss(model, 3).backward()
    case.step(optimizer)
    assert_moved(model.parameters(), before)
    assert all(float(optimizer.state[p]["step"]) == 4 for p in model.parameters())


def test_long_schedule_on_adamws_betas_leaves_the_rules_own_group_alone() -> None:
    """OneCycle changes AdamW's betas in every step; the rule's own group is stepped as without them."""
    results = []
    for routed in (True, False):
        w, b = nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(5))
        groups: list[dict[str, Any]] = [{"params": [w]}] + ([{"params": [b], "rule": "adamw"}] if routed else [])
        optimizer = LearnedOptimizer(groups, RULES["small_fc"]())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1.0, 1e-3][: len(groups)], total_steps=150)
        for _ in range(149):
            w.grad, b.grad = torch.ones(6, 5), torch.ones(5)
            optimizer.step()
            scheduler.step()
        results.append(w.detach())
    assert torch.equal(*results)
