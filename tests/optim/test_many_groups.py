"""Groups that differ in numbers only are stepped together: what a step costs does not grow with their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from lopt_kernels.launching.op import count_launches
from rule_cases import make_quick
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.optim.plans import Plan, read_clock
from lopt.optim.update import ParameterUpdate
from lopt.rules import RULES

Options = dict[str, Any]
QUICK = ["small_fc", "celo2", "velo"]
every_rule = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in RULES]
)


def draw(i: int, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    return torch.randn(shape, generator=make_generator(i))


def number(i: int) -> Options:
    """Options of group i, in numbers of its own."""
    return {"lr": 0.5 + 0.1 * i, "weight_decay": 0.01 * i, "num_steps": 20 + i // 2, "betas": (0.8, 0.99 - 0.001 * i)}


def make(rule: str, count: int, shape: tuple[int, ...] = (2, 3), **options: Any) -> LearnedOptimizer:
    """A group for each of `count` parameters of one shape, with gradients."""
    groups = [{"params": [nn.Parameter(draw(i, shape))]} | number(i) for i in range(count)]
    optimizer = LearnedOptimizer(groups, make_quick(rule), **options)
    set_grads(optimizer, 0)
    return optimizer


def list_params(optimizer: LearnedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: LearnedOptimizer, step: int) -> None:
    for i, p in enumerate(list_params(optimizer)):
        p.grad = draw(100 * step + i + 50, tuple(p.shape)).to(p.dtype)


def assert_moved_alike(ours: LearnedOptimizer, theirs: LearnedOptimizer, start: list[Tensor], rtol: float) -> None:
    """Their paths from `start` agree, relative to the longest step."""
    for a, b, p in zip(list_params(ours), list_params(theirs), start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float((b - p).detach().abs().max()))


class Operations(TorchDispatchMode):
    """How many operations ran while the mode was on, and the elements of the largest result."""

    count, largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        self.largest = max([self.largest] + [x.numel() for x in [result] if isinstance(x, Tensor)])
        return result


@every_rule
@pytest.mark.parametrize("guard", [False, True], ids=["", "guard"])
def test_number_of_operations_does_not_grow_with_groups_that_differ_in_numbers(name: str, guard: bool) -> None:
    counts = set()
    for count in (3, 6, 40):
        optimizer = make(name, count, guard=guard)
        optimizer.step(loss=1.0)
        with Operations() as operations:
            optimizer.step(loss=1.0)
        counts.add(operations.count)
    assert len(counts) == 1


def test_groups_of_equal_numbers_cost_no_operation_more_than_one_group() -> None:
    counts = []
    for split in (1, 6):
        params = [nn.Parameter(draw(i)) for i in range(6)]
        groups = [{"params": params[i::split]} for i in range(split)]
        optimizer = LearnedOptimizer(groups, make_quick("velo"), lr=0.5, weight_decay=0.1, num_steps=9)
        set_grads(optimizer, 0)
        optimizer.step(loss=1.0)
        with Operations() as operations:
            optimizer.step(loss=1.0)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def set_betas(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Betas and eps of each group's own, which change in every step."""
    for i, group in enumerate(optimizer.param_groups):
        group["betas"] = (0.5 + 0.03 * i, 0.9 + 0.005 * i - 0.01 * step)
        group["eps"] = 0.1 * (i + 1) / (step + 1)


@pytest.mark.parametrize("backend", ["torch", "one by one", "triton", "compiled", "compiled triton"])
def test_groups_of_adamw_with_betas_of_their_own_do_as_torchs(backend: str) -> None:
    """The right value is of `torch.optim.AdamW` with the same groups, in float64."""
    if "triton" in backend:
        pytest.importorskip("triton")
    torch._dynamo.reset()
    ours, theirs = ([nn.Parameter(draw(i).to(d)) for i in range(4)] for d in (torch.float32, torch.float64))
    numbers: list[Options] = [{"lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i in range(4)]
    groups = [{"params": [p], "rule": "adamw"} | n for p, n in zip(ours, numbers, strict=True)]
    kernels = "triton" if "triton" in backend else "torch"
    optimizer = LearnedOptimizer(groups, make_quick("small_fc"), backend=kernels, foreach=backend != "one by one")
    peer = torch.optim.AdamW([{"params": [p]} | n for p, n in zip(theirs, numbers, strict=True)])
    step_ours = (
        torch.compile(optimizer.step, fullgraph=True, backend="eager") if "compiled" in backend else optimizer.step
    )
    for step in range(2):  # a graph holds the numbers: every step here is traced anew
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = draw(100 * step + i).double()
            p.grad = q.grad.float()
        for one in (optimizer, peer):
            set_betas(one, step)
        step_ours()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rule", ["adamw", pytest.param("small_fc", marks=pytest.mark.slow), "celo"])
def test_neither_operations_nor_launches_grow_with_groups_of_numbers_of_their_own(rule: str, backend: str) -> None:
    """With the triton backend, in the interpreter, which looks at every tensor by operations of its own."""
    if backend == "triton":
        pytest.importorskip("triton")
    counts, launches = set(), set()
    for count in (3, 6):
        optimizer = make("small_fc" if rule == "adamw" else rule, count, backend=backend)
        for group in optimizer.param_groups:
            group["rule"] = "adamw" if rule == "adamw" else group["rule"]
        set_betas(optimizer, 0)
        optimizer.step(loss=1.0)
        with Operations() as operations, count_launches() as counter:
            optimizer.step(loss=1.0)
        launches.add(counter.launches)
        counts.add(operations.count if backend == "torch" else 0)
    assert len(counts) == len(launches) == 1
    assert (launches == {0}) is (backend == "torch")


@every_rule
@pytest.mark.parametrize("lr_in", ["numbers", "tensors", "one of each"])
def test_groups_stepped_together_go_where_single_tensors_go(name: str, lr_in: str) -> None:
    """Numbers change with every step, as schedulers change them; NaN gradients and rates of 0 are among them."""
    together, alone = make(name, 5), make(name, 5, foreach=False)
    start = [p.detach().clone() for p in list_params(alone)]
    for step in range(4):
        for optimizer in (together, alone):
            set_grads(optimizer, step)
            for i, group in enumerate(optimizer.param_groups):
                lr = 0.0 if i == 4 else (0.5 + 0.1 * i) / (step + 1)
                in_tensor = lr_in == "tensors" or (lr_in == "one of each" and i == 1)
                group["lr"] = torch.tensor(lr) if in_tensor else lr
                group["weight_decay"] = 0.02 * (i % 3) / (step + 1)
            if step == 2:
                list_params(optimizer)[1].grad[0, 0] = float("nan")  # type: ignore[index]
            optimizer.step(loss=1.0 / (step + 1))
    # One rounds lr * delta before it is added, the other after.
    assert_moved_alike(together, alone, start, rtol=1e-5)
    assert together.report() == alone.report()
    assert torch.equal(list_params(together)[4], start[4])


def test_guards_adamw_has_the_betas_of_each_group() -> None:
    """A loss that is not finite gives AdamW the next steps; these are torch's with the same groups, in float64."""
    ours, theirs = ([nn.Parameter(draw(i).to(d)) for i in range(4)] for d in (torch.float32, torch.float64))
    numbers: list[Options] = [{"betas": (0.5 + 0.1 * i, 0.9 + 0.02 * i), "eps": 0.1 * (i + 1)} for i in range(4)]
    rule = RULES["sgd"](lr=0.0)
    optimizer = LearnedOptimizer([{"params": [p]} | n for p, n in zip(ours, numbers, strict=True)], rule, guard=True)
    copies = [{"params": [p], "lr": 1e-3, "weight_decay": 0.0} | n for p, n in zip(theirs, numbers, strict=True)]
    peer = torch.optim.AdamW(copies)
    for step, loss in enumerate([1.0, float("nan"), 1.0, 1.0, 1.0]):
        set_grads(optimizer, step)
        optimizer.step(loss=loss)
        if step > 1:  # those of the first are undone, moments too
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.double()  # type: ignore[union-attr]
            peer.step()
    assert optimizer.report().adamw_steps == 3
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(p.double() - draw(i), q - draw(i).double(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_of_numbers_of_their_own_do_as_torchs_optimizers(rule: str, dtype: torch.dtype) -> None:
    """The right value is of torch's own optimizer with the same groups, in float64."""
    params, theirs = ([nn.Parameter(draw(i).to(d)) for i in range(6)] for d in (dtype, torch.float64))
    groups = [{"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(params)]
    copies = [group | {"params": [p]} for group, p in zip(groups, theirs, strict=True)]
    if rule == "adamw":
        peer: torch.optim.Optimizer = torch.optim.AdamW(copies)
        groups = [group | {"rule": "adamw"} for group in groups]
    else:  # its decay is part of the gradient, which without momentum is the same
        peer = torch.optim.SGD(copies)
    optimizer = LearnedOptimizer(groups, RULES["sgd"](lr=1.0))
    for step in range(5):
        for i, (p, q) in enumerate(zip(params, theirs, strict=True)):
            q.grad = draw(100 * step + i).double()
            p.grad = q.grad.to(dtype)
        optimizer.step()
        peer.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rule", "adamw"])
def test_rates_on_a_device_are_not_waited_for(kind: str) -> None:
    """Tensors of the meta device have no values: whoever asks for one is refused."""
    params = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(4)]
    groups: list[Options] = [{"params": [p]} | ({"rule": "adamw"} if kind == "adamw" else {}) for p in params]
    optimizer = LearnedOptimizer(groups, make_quick("small_fc"))
    for p in params:
        p.grad = torch.empty(3, device="meta")
    optimizer.step()  # makes the state
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.1 if i == 2 else torch.ones((), device="meta")
    optimizer.step()


def test_decay_of_0_beside_others_leaves_infinite_numbers_as_they_are() -> None:
    p = torch.tensor([[torch.inf, 1.0]] * 2)
    moved = ParameterUpdate(lr=0.5, decay=torch.tensor([0.0, 0.5])).move(p, torch.full_like(p, -1.0))
    assert moved[:, 1].tolist() == [0.5, 0.25]
    assert float(moved[0, 0]) == torch.inf


def test_groups_that_maximise_are_stepped_apart() -> None:
    up, down = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [{"params": [up], "maximize": True, "lr": 0.5}, {"params": [down], "lr": 0.25}]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](lr=1.0))
    up.grad = down.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(up, torch.full((3,), 0.5))
    assert torch.equal(down, torch.full((3,), -0.25))


def test_large_tensors_keep_the_numbers_of_their_groups() -> None:
    params = [nn.Parameter(torch.zeros(1_000_000)) for _ in range(2)]
    groups = [{"params": [p], "lr": 0.5 + i} for i, p in enumerate(params)]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](lr=1.0))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float(p.detach().min()) for p in params] == [float(p.detach().max()) for p in params] == [-0.5, -1.5]


@pytest.mark.parametrize("lr", ["numbers", "tensors"])
def test_compiled_step_of_many_groups_does_as_the_plain_one(lr: str) -> None:
    torch._dynamo.reset()
    plain, compiled = (make("celo_adam", 3) for _ in range(2))
    start = [p.detach().clone() for p in list_params(plain)]
    for optimizer in (plain, compiled):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"]) if lr == "tensors" else group["lr"]
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for i in range(2):
        for optimizer in (plain, compiled):
            set_grads(optimizer, i)
        plain.step(loss=torch.tensor(1.0))
        step(loss=torch.tensor(1.0))
    assert counter.frame_count == 1
    assert_moved_alike(compiled, plain, start, rtol=1e-4)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_run_is_as_far_as_the_farthest_tensor_of_the_same_plan() -> None:
    """The right value is a loop over plans in numpy."""
    rng = np.random.default_rng(0)
    plans, made = rng.integers(1, 40, 500), rng.integers(0, 1000, 500)
    clock = read_clock(torch.from_numpy(made), [Plan(plan, 0, plan) for plan in plans.tolist()])
    assert clock.num_steps is not None
    assert clock.num_steps.tolist() == plans.tolist()
    assert clock.count_steps().tolist() == [int(made[plans == plan].max()) for plan in plans]


def test_memory_of_plans_is_linear_in_the_number_of_tensors() -> None:
    count = 1000
    with Operations() as operations:
        read_clock(torch.arange(count), [Plan(10 + i % 2, 0, 10 + i % 2) for i in range(count)])
    assert operations.largest <= count + 2  # the places of all, and the plans
