"""The contract of a torch optimizer: dtypes, autocast, gradient scaling, clipping and accumulation."""

from __future__ import annotations

import pytest
import torch
from contract_cases import (
    LEARNED,
    Case,
    assert_close,
    assert_moved,
    assert_same,
    clone,
    compute_loss,
    copy_state,
    draw,
    every_case,
    every_rule,
    is_same,
    make_model,
    make_params,
    run_steps,
    set_grads,
)
from torch import nn
from torch.optim import Optimizer

from lopt import LearnedOptimizer
from lopt.rules import RULES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LSTM = LEARNED[0]


# -- dtypes ----------------------------------------------------------------------------------------


@every_case
def test_dtypes_mix_in_one_group_and_are_kept(case: Case) -> None:
    params = [p for i, dtype in enumerate(DTYPES) for p in make_params([(6, 5), (5,)], seed=i, dtype=dtype)]
    optimizer = case.make(params)
    before = clone(params)
    run_steps(case, optimizer, params, 3)
    assert_moved(params, before)
    assert [p.dtype for p in params] == [dtype for dtype in DTYPES for _ in range(2)]


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_stepped_in_fp32_and_rounded_once(case: Case, dtype: torch.dtype) -> None:
    halves = make_params(dtype=dtype)
    wholes = [nn.Parameter(p.detach().float()) for p in halves]
    optimizers = case.make(halves, weight_decay=0.1), case.make(wholes, weight_decay=0.1)
    for step in range(3):
        set_grads(halves, step)
        for half, whole in zip(halves, wholes, strict=True):
            assert half.grad is not None
            whole.data.copy_(half.detach())
            whole.grad = half.grad.float()
        before = clone(halves)
        for optimizer in optimizers:
            case.step(optimizer)
        for half, whole, b in zip(halves, wholes, before, strict=True):
            # to the nearest: half a unit in the last place, and a little where the sums are in another order
            error = (half.detach().double() - whole.detach().double()).abs()
            unit = torch.finfo(dtype).eps * torch.maximum(whole.detach().abs(), b.float().abs()).double()
            assert bool((error <= 0.51 * unit + 1e-7).all())


@every_rule
def test_fp64_parameters_keep_what_fp32_cannot_hold(case: Case) -> None:
    p = nn.Parameter(1 + 1e-12 * torch.arange(4, dtype=torch.float64))
    optimizer = case.make([p], lr=1e-3)
    p.grad = torch.full_like(p, 0.1)
    case.step(optimizer)
    torch.testing.assert_close(p.detach().diff(), torch.full((3,), 1e-12, dtype=torch.float64), rtol=1e-2, atol=0)


@every_case
def test_default_dtype_does_not_matter(case: Case) -> None:
    runs = []
    for dtype in (torch.float32, torch.float64):
        params = make_params()
        rule = {"rule": case.make_rule()} if case.learned else {}
        torch.set_default_dtype(dtype)
        try:
            optimizer = case.make(params, **rule)
            run_steps(case, optimizer, params, 3)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(clone(params))
        dtypes = {value.dtype for state in optimizer.state.values() for value in state.values()}
        assert not case.learned or dtypes == {torch.int64, torch.float32}
    assert_close(runs[1], runs[0], make_params(), 1e-5)


# -- stochastic rounding ---------------------------------------------------------------------------

COUNT, TINY_STEPS = 4096, 64


def walk_in_tiny_steps(stochastic: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Parameter, Optimizer]:
    """Steps of weight decay alone, a 32nd of the distance between bf16 numbers at 1 each."""
    p = nn.Parameter(torch.ones(COUNT, dtype=dtype))
    step = torch.finfo(torch.bfloat16).eps / 2 / 32  # below 1 numbers are twice as dense
    optimizer = LSTM.make([p], lr=1e-3, weight_decay=step / 1e-3, stochastic_rounding=stochastic)
    optimizer.rule.w_out.zero_()  # type: ignore[attr-defined]
    optimizer.rule.b_out.zero_()  # type: ignore[attr-defined]
    for _ in range(TINY_STEPS):
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    return p, optimizer


def test_tiny_steps_of_bf16_parameters_stall_when_rounded_to_the_nearest() -> None:
    p, _ = walk_in_tiny_steps(stochastic=False)
    assert bool((p == 1).all())


def test_stochastic_rounding_moves_bf16_parameters_by_tiny_steps_in_the_mean() -> None:
    p, _ = walk_in_tiny_steps(stochastic=True)
    exact, _ = walk_in_tiny_steps(stochastic=False, dtype=torch.float32)
    moved, expected = float(1 - p.detach().double().mean()), float(1 - exact.detach().double().mean())
    # 64 draws with chance 1/32 for each of 4096: a standard deviation of 1.1 % of the mean
    assert moved == pytest.approx(expected, rel=0.06)
    assert len(p.unique()) > 2


def test_stochastic_rounding_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random = torch.get_rng_state()
        results.append(walk_in_tiny_steps(stochastic=True)[0].detach())
        assert torch.equal(torch.get_rng_state(), random)
    assert_same(*results)


def test_stochastic_rounding_resumes_exactly() -> None:
    params, others = make_params(dtype=torch.bfloat16), make_params(dtype=torch.bfloat16)
    optimizer = LSTM.make(params, stochastic_rounding=True)
    run_steps(LSTM, optimizer, params, 2)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed = LSTM.make(others, stochastic_rounding=True)
    resumed.load_state_dict(copy_state(optimizer))
    run_steps(LSTM, optimizer, params, 2, first=2)
    run_steps(LSTM, resumed, others, 2, first=2)
    assert_same(clone(others), clone(params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stochastic_rounding_changes_nothing_but_bf16(dtype: torch.dtype) -> None:
    runs = []
    for stochastic in (False, True):
        params = make_params(dtype=dtype)
        optimizer = LSTM.make(params, stochastic_rounding=stochastic)
        run_steps(LSTM, optimizer, params, 2)
        runs.append(clone(params))
    assert_same(*runs)


def test_stochastic_rounding_keeps_a_frozen_parameter_to_the_bit() -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = LSTM.make(params, lr=0.0, stochastic_rounding=True)
    before = clone(params)
    run_steps(LSTM, optimizer, params, 2)
    assert_same(clone(params), before)


# -- mixed precision in training -------------------------------------------------------------------


@every_case
def test_step_under_autocast_is_the_step_outside(case: Case) -> None:
    runs = []
    for enabled in (False, True):
        params = make_params()
        optimizer = case.make(params)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run_steps(case, optimizer, params, 3)
        runs.append((clone(params), copy_state(optimizer)))
    assert_same(*runs)


@every_case
def test_training_under_autocast_moves_fp32_parameters(case: Case) -> None:
    model = make_model()
    optimizer = case.make(model.parameters())
    before = clone(model.parameters())
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        case.step(optimizer)
    assert_moved(model.parameters(), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def scaled_step(case: Case, scaler: torch.amp.GradScaler, optimizer: Optimizer, model: nn.Module, step: int) -> None:
    optimizer.zero_grad()
    scaler.scale(compute_loss(model, step)).backward()
    scaler.step(optimizer, **({"loss": 0.5} if case.needs_loss else {}))
    scaler.update()


@every_case
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled by hand"])
def test_grad_scaler_skips_a_step_that_overflows_to_the_bit_and_goes_on(case: Case, unscaled: bool) -> None:
    model = make_model()
    optimizer, scaler = case.make(model.parameters(), weight_decay=0.1), torch.amp.GradScaler("cpu", 1024.0)
    scaled_step(case, scaler, optimizer, model, 0)
    before = clone(model.parameters()), copy_state(optimizer)
    optimizer.zero_grad()
    scaler.scale(compute_loss(model, 1)).backward()
    grad = model[0].weight.grad  # type: ignore[union-attr]
    assert isinstance(grad, torch.Tensor)
    grad[0, 0] = float("inf")  # in one tensor only: all of them are skipped
    if unscaled:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer, **({"loss": 0.5} if case.needs_loss else {}))
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same((clone(model.parameters()), copy_state(optimizer)), before)
    scaled_step(case, scaler, optimizer, model, 2)
    assert_moved(model.parameters(), before[0])


@every_case
def test_grad_scaler_does_not_change_the_path(case: Case) -> None:
    plain, scaled = make_model(), make_model()
    optimizers = case.make(plain.parameters()), case.make(scaled.parameters())
    off = torch.amp.GradScaler("cpu", enabled=False)
    on = torch.amp.GradScaler("cpu", 1024.0)  # a power of two: exact
    for step in range(3):
        scaled_step(case, off, optimizers[0], plain, step)
        scaled_step(case, on, optimizers[1], scaled, step)
    assert_close(scaled.parameters(), plain.parameters(), make_model().parameters(), 1e-5)


# -- clipping and accumulation ---------------------------------------------------------------------


@every_case
def test_clipped_gradients_are_what_is_stepped_on(case: Case) -> None:
    params, others = make_params(), make_params()
    optimizer, other = case.make(params), case.make(others)
    for step, limit in enumerate((0.5, 0.05)):
        set_grads(params, step)
        set_grads(others, step)
        norm = nn.utils.clip_grad_norm_(params, limit)
        assert float(norm) > limit
        nn.utils.clip_grad_value_(params, 0.02)
        for q in others:
            assert q.grad is not None
            q.grad = (q.grad * (limit / (norm + 1e-6))).clamp(-0.02, 0.02)
        case.step(optimizer)
        case.step(other)
    assert_close(params, others, make_params(), 1e-3)  # the norm is summed in another order


@every_case
def test_accumulated_gradients_are_their_sum(case: Case) -> None:
    whole, parts = make_model(), make_model()
    optimizers = case.make(whole.parameters()), case.make(parts.parameters())
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        compute_loss(whole, step).backward()
        for rows in (slice(0, 4), slice(4, 16)):
            share = (rows.stop - rows.start) / 16
            (share * compute_loss(parts, step, rows)).backward()
        # gradients round differently, and what normalises them enlarges that: give both the very same sum
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
            p.grad.copy_(q.grad)
        for optimizer in optimizers:
            case.step(optimizer)
    assert_same(clone(parts.parameters()), clone(whole.parameters()))


@every_case
def test_gradient_that_was_set_to_zero_is_not_a_missing_one(case: Case) -> None:
    (p,), (q,) = make_params([(6, 5)]), make_params([(6, 5)])
    optimizers = case.make([p], weight_decay=0.1), case.make([q], weight_decay=0.1)
    p.grad, q.grad = torch.zeros_like(p), None
    for optimizer in optimizers:
        case.step(optimizer)
    assert float(optimizers[0].state[p]["step"]) == 1
    assert not is_same(p.detach(), q.detach())
    assert_same(q.detach(), draw(0, 6, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
def test_default_dtype_does_not_change_a_bit(dtype: torch.dtype, guard: bool) -> None:
    """Of rules that hold the step of a whole tensor, too."""
    results = []
    rule = RULES["celo2"]()
    for default in (torch.float32, dtype):
        params = make_params([(6, 5), (5,), (6, 5), (4, 3, 2, 2), (40, 30)])
        for p in params:
            p.grad = p.detach().clone()
        optimizer = LearnedOptimizer(params, rule, guard=guard)
        torch.set_default_dtype(default)
        try:
            for _ in range(2):
                optimizer.step(loss=1.0)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(clone(params))
    assert_same(*results)


# -- the state's dtype -----------------------------------------------------------------------------


def test_state_in_bf16_takes_half_the_memory_and_steps_nearly_the_same() -> None:
    wholes, halves = make_params(), make_params()
    optimizers = LSTM.make(wholes), LSTM.make(halves, state_dtype=torch.bfloat16)
    before = clone(wholes)
    for optimizer, params in zip(optimizers, (wholes, halves), strict=True):
        run_steps(LSTM, optimizer, params, 3)
    for a, b, start in zip(halves, wholes, before, strict=True):
        moved = torch.linalg.vector_norm(b.detach() - start)
        assert torch.linalg.vector_norm(a.detach() - b.detach()) <= 2e-2 * moved
    for p in halves:
        kept = {key: x for key, x in optimizers[1].state[p].items() if key != "step"}
        assert {x.dtype for x in kept.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_loaded_state_has_the_dtype_that_was_asked_for(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    params = make_params()
    first = LSTM.make([{"params": params[:2]}, {"params": params[2:], "rule": "adamw"}], state_dtype=dtypes[0])
    run_steps(LSTM, first, params, 2)
    second = LSTM.make([{"params": params[:2]}, {"params": params[2:], "rule": "adamw"}], state_dtype=dtypes[1])
    second.load_state_dict(first.state_dict())
    assert {second.state[params[0]][key].dtype for key in ("h1", "c1", "h2", "c2")} == {dtypes[1]}
    assert {second.state[params[2]][key].dtype for key in ("m", "v")} == {torch.float32}
    run_steps(LSTM, second, params, 1)


@pytest.mark.parametrize(
    ("rule", "dtype", "message"),
    [("small_fc", torch.bfloat16, "its state is kept in torch.float32"), ("lstm", torch.float16, "must be one of")],
)
def test_state_dtypes_that_would_lose_updates_are_refused(rule: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(make_params(), RULES[rule](), state_dtype=dtype)
