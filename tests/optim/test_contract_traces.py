"""The contract of a torch optimizer: what a step may depend on, and what it leaves in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from contract_cases import (
    CONTROL,
    Case,
    Params,
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
from torch import Tensor

ROUNDING = 1e-4  # of the movement: the same formula in another order of operations, over a few steps


# -- what the result may depend on -----------------------------------------------------------------


@every_case
def test_order_and_grouping_of_parameters_do_not_matter(case: Case) -> None:
    shapes, results = [(6, 5), (6, 5), (5,), (5,), (), (6, 5)], []
    orders: list[list[list[int]]] = [[[0, 1, 2, 3, 4, 5]], [[5, 3, 1, 4, 2, 0]], [[4], [0, 5], [3, 2, 1]]]
    for order in orders:
        params = make_params(shapes)
        optimizer = case.make([{"params": [params[i] for i in group]} for group in order])
        run_steps(case, optimizer, params, 3)
        results.append(params)
    for result in results[1:]:
        assert_close(result, results[0], make_params(shapes), ROUNDING)


@every_case
def test_equal_runs_are_equal_to_the_bit_and_use_no_randomness(case: Case) -> None:
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random = torch.get_rng_state()
        params = make_params()
        optimizer = case.make(params)
        run_steps(case, optimizer, params, 3)
        results.append((clone(params), copy_state(optimizer)))
        assert torch.equal(torch.get_rng_state(), random)
    assert_same(*results)


@every_case
def test_optimizer_in_backward_with_one_optimizer_per_tensor(case: Case) -> None:
    model = make_model()
    optimizers = {p: case.make([p]) for p in model.parameters()}

    def step(p: Tensor) -> None:
        case.step(optimizers[p])  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = clone(model.parameters())
    for index in range(2):
        compute_loss(model, index).backward()
    assert all(p.grad is None for p in model.parameters())
    assert_moved(model.parameters(), before)


# -- memory ----------------------------------------------------------------------------------------


@every_case
def test_sixty_steps_leave_no_tensor_behind_and_state_keeps_its_size(case: Case) -> None:
    gc.collect()
    gc.freeze()  # what is there already need not be looked at
    params = make_params()
    optimizer = case.make(params)

    def measure() -> tuple[int, int]:
        gc.collect()
        alive = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        storages = [v.untyped_storage() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return alive, sum(storage.nbytes() for storage in storages)

    try:
        run_steps(case, optimizer, params, 2)
        before = measure()
        assert before[0] > len(params)
        run_steps(case, optimizer, params, 60, first=2)
        assert measure() == before
    finally:
        gc.unfreeze()


@every_case
def test_optimizer_and_parameters_are_freed_with_their_last_reference(case: Case) -> None:
    params: Params = make_params()
    optimizer: Any = case.make(params)
    run_steps(case, optimizer, params, 2)
    alive = [weakref.ref(x) for x in (optimizer, *params)]
    del optimizer, params
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@every_case
def test_gradients_with_a_graph_leave_none_in_the_state(case: Case) -> None:
    (p,) = make_params([(6, 5)])
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    assert p.grad.requires_grad
    optimizer = case.make([p])
    case.step(optimizer)
    assert not any(value.requires_grad for value in optimizer.state[p].values())
    p.grad = None  # parameter and gradient refer to each other


def test_control_is_torchs_adamw() -> None:
    assert type(CONTROL.make(make_params())) is torch.optim.AdamW
