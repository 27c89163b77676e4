"""The contract of a torch optimizer: what `step` does to parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import (
    LOSS,
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
    make_model,
    make_params,
    run_steps,
    set_grads,
)
from torch import Tensor, nn

ROUNDING = 1e-4  # of the movement: the same formula in another order of operations, over a few steps


@every_case
def test_step_is_in_place_and_leaves_gradients_and_modes_alone(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    pointers, before, random = [p.data_ptr() for p in params], clone(params), torch.get_rng_state()
    for step in range(2):
        set_grads(params, step)
        grads = [p.grad for p in params]
        values = clone(g for g in grads if g is not None)
        assert case.step(optimizer) is None
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_same(clone(g for g in grads if g is not None), values)
    assert [p.data_ptr() for p in params] == pointers
    assert all(p.requires_grad and p.is_leaf for p in params)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert_moved(params, before)


@every_case
def test_step_tells_autograd_that_parameters_changed(case: Case) -> None:
    params = make_params([(6, 5)])
    loss = (params[0] ** 2).sum()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- closures --------------------------------------------------------------------------------------


@every_case
def test_closure_runs_once_with_gradients_on_and_its_loss_comes_back(case: Case) -> None:
    model, calls = make_model(), []
    optimizer = case.make(model.parameters())

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = compute_loss(model, 0)
        loss.backward()
        return loss

    expected, before = compute_loss(model, 0).item(), clone(model.parameters())
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected
        assert optimizer.step(closure=closure).item() != expected
        assert not torch.is_grad_enabled()
    assert calls == [True, True]
    assert_moved(model.parameters(), before)


@every_case
def test_closure_none_is_no_closure(case: Case) -> None:
    results: list[list[Tensor]] = []
    calls: list[tuple[tuple[None, ...], dict[str, Any]]] = [((), {}), ((None,), {}), ((), {"closure": None})]
    for arguments, keywords in calls:
        params = make_params()
        optimizer: Any = case.make(params)
        set_grads(params, 0)
        loss = {"loss": LOSS} if case.needs_loss else {}
        assert optimizer.step(*arguments, **keywords, **loss) is None
        results.append(clone(params))
    assert_same(results[1:], results[:1] * 2)


@every_case
def test_error_in_a_closure_changes_nothing(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    before, state = clone(params), copy_state(optimizer)

    def closure() -> float:
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="mine"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_same(clone(params), before)
    assert_same(copy_state(optimizer), state)


# -- gradients that are missing --------------------------------------------------------------------


@every_case
def test_parameters_without_gradient_stay_and_thaw(case: Case) -> None:
    params = make_params()
    params[1].requires_grad_(False)
    optimizer = case.make(params)
    case.step(optimizer)
    assert not optimizer.state
    before = clone(params)
    run_steps(case, optimizer, params[:1], 2)
    assert_same(clone(params[1:]), before[1:])
    assert set(optimizer.state) == {params[0]}
    params[0].grad = None
    params[1].requires_grad_(True)
    middle = clone(params)
    run_steps(case, optimizer, params[1:], 1)
    assert_same(params[0].detach(), middle[0])
    assert_moved(params[1:], middle[1:])
    assert float(optimizer.state[params[1]]["step"]) == 1
    assert float(optimizer.state[params[0]]["step"]) == 2


@every_case
def test_tied_parameter_is_one_parameter(case: Case) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = case.make(model.parameters())
    before = clone(model.parameters())
    (model(draw(0, 8, 4)) ** 2).sum().backward()
    case.step(optimizer)
    assert len(before) == len(optimizer.state) == 1
    assert float(optimizer.state[model[0].weight]["step"]) == 1
    assert_moved(model.parameters(), before)


@every_case
def test_sparse_gradient_is_refused_before_parameters_change(case: Case) -> None:
    params = make_params([(6, 5), (6, 5)])
    optimizer = case.make(params)
    set_grads(params, 0)
    assert params[1].grad is not None
    params[1].grad = params[1].grad.to_sparse()
    before = clone(params)
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as caught:
        case.step(optimizer)
    assert "aten::" not in str(caught.value)
    assert_same(clone(params), before)
    if case.learned:
        assert not optimizer.state


@every_rule
def test_complex_parameter_is_refused_before_anything_changes(case: Case) -> None:
    params = [*make_params([(6, 5)]), nn.Parameter(torch.ones(3, dtype=torch.cfloat))]
    optimizer = case.make(params)
    set_grads(params, 0)
    before = clone(params)
    with pytest.raises(RuntimeError, match=r"does not support complex parameters.*view_as_complex"):
        case.step(optimizer)
    assert_same(clone(params), before)
    assert not optimizer.state


# -- shapes and layouts ----------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (1, 7), (7, 1), (2, 1, 3, 2, 2)], ids=str)
def test_tensors_of_any_shape_are_stepped(case: Case, shape: tuple[int, ...]) -> None:
    params = make_params([shape, (6, 5), shape])
    before = clone(params)
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 3)
    assert_moved(params, before)
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
}


@every_case
@pytest.mark.parametrize("of_gradient", ["expanded", *LAYOUTS])
@pytest.mark.parametrize("of_parameter", LAYOUTS)
def test_layouts_do_not_matter(case: Case, of_parameter: str, of_gradient: str) -> None:
    dense = draw(0, 6, 4, 3, 2)
    expected, p = nn.Parameter(dense.clone()), nn.Parameter(LAYOUTS[of_parameter](dense))
    assert not p.is_contiguous()
    place = p.stride(), p.data_ptr()
    optimizers = case.make([expected]), case.make([p])
    for step in range(3):
        if of_gradient == "expanded":
            grad = draw(1 + step, 6, 1, 3, 2).expand_as(dense)
            p.grad = grad
        else:
            grad = draw(1 + step, 6, 4, 3, 2)
            p.grad = LAYOUTS[of_gradient](grad)
        expected.grad = grad.contiguous()
        for optimizer in optimizers:
            case.step(optimizer)
    assert_close([p], [expected], [dense], ROUNDING)
    assert (p.stride(), p.data_ptr()) == place


# -- options that change the step ------------------------------------------------------------------


@every_case
def test_zero_lr_freezes_to_the_bit_weight_decay_included(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params, lr=0.0, weight_decay=0.1)
    before = clone(params)
    run_steps(case, optimizer, params, 2)
    assert_same(clone(params), before)
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)


@every_case
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_lr_as_a_tensor_is_lr_as_a_number(case: Case, shape: tuple[int, ...]) -> None:
    params, others = make_params(), make_params()
    rate = torch.full(shape, case.lr)
    optimizer, other = case.make(params), case.make(others, lr=rate)
    for step, factor in enumerate((1.0, 0.5, 2.0)):
        rate.fill_(case.lr * factor)  # as a scheduler does it
        optimizer.param_groups[0]["lr"] = case.lr * factor
        run_steps(case, optimizer, params, 1, step)
        run_steps(case, other, others, 1, step)
    assert other.param_groups[0]["lr"] is rate
    assert_close(others, params, make_params(), 1e-6)


@every_case
def test_weight_decay_is_decoupled(case: Case) -> None:
    """`- lr * weight_decay * p`, beside whatever the gradient makes of it; celo2 counts lr in its own unit."""
    ((free,), (decayed,)) = make_params([(6, 5)]), make_params([(6, 5)])
    start, decay = free.detach().clone(), 0.1
    optimizers = case.make([free]), case.make([decayed], weight_decay=decay)
    for p, optimizer in zip((free, decayed), optimizers, strict=True):
        run_steps(case, optimizer, [p], 1)
    scale = optimizers[0].rule.decay_scale if case.learned else 1.0  # type: ignore[attr-defined]
    torch.testing.assert_close(decayed - free, -case.lr * decay * scale * start, rtol=1e-2, atol=1e-7)


@pytest.mark.filterwarnings("ignore:rule 'velo' reads the training loss")
@every_case
@pytest.mark.parametrize("where", ["optimizer", "group"])
def test_maximize_steps_as_on_negative_gradients(case: Case, where: str) -> None:
    """Without a loss: its sign would turn, too."""
    params, others, neither = make_params(), make_params(), make_params()
    optimizer = case.make(params, maximize=True)
    if where == "group":
        optimizer = case.make([{"params": params, "maximize": True}])
    other, plain = case.make(others), case.make(neither)
    for step in range(2):
        set_grads(params, step)
        set_grads(neither, step)
        set_grads(others, step, scale=-1.0)
        for each in (optimizer, other, plain):
            each.step()
    assert_same(clone(params), clone(others))
    assert not torch.equal(params[0], neither[0])
    assert all(p.grad is not None and torch.equal(p.grad, -q.grad) for p, q in zip(params, others, strict=True))


@every_rule
def test_capturable_is_an_option_that_changes_no_number(case: Case) -> None:
    runs = []
    for capturable in (False, True):
        params = make_params()
        optimizer = case.make(params, capturable=capturable)
        assert optimizer.param_groups[0]["capturable"] is capturable
        run_steps(case, optimizer, params, 3)
        runs.append(clone(params))
    assert_close(runs[1], runs[0], make_params(), ROUNDING)


@every_rule
def test_step_that_only_asks_for_state_leaves_the_later_path_exact(case: Case) -> None:
    """torch.distributed.checkpoint makes state exist by a step with zero gradients and lr 0 (pytorch#164929)."""
    runs = []
    for asked in (False, True):
        params = make_params()
        optimizer = case.make(params, weight_decay=0.1)
        if asked:
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.step(closure=None)
            assert all(int(optimizer.state[p]["step"]) == 0 for p in params)
            optimizer.param_groups[0]["lr"] = case.lr
            optimizer.zero_grad()
        run_steps(case, optimizer, params, 3)
        runs.append((clone(params), copy_state(optimizer)))
    assert_same(*runs)


@every_rule
def test_zero_gradients_and_zero_lr_in_mid_run_are_a_step(case: Case) -> None:
    params = make_params()
    optimizer = case.make(params)
    run_steps(case, optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    case.step(optimizer)
    assert all(int(optimizer.state[p]["step"]) == 2 for p in params)
