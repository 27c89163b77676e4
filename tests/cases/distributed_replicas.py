"""Checks of replicated parameters: DistributedDataParallel and ZeroRedundancyOptimizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from distributed_workers import (
    CONTROL,
    PLANNED,
    RATES,
    READ_LOSS,
    REST,
    RULES_ASKED,
    Net,
    World,
    assert_equal,
    assert_moved_alike,
    assert_ranks_equal,
    check,
    gather_all,
    make_batch,
    make_optimizer,
    make_rule,
    step_with,
    train,
    train_alone,
)
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lopt import LearnedOptimizer


@check(CONTROL, *RULES_ASKED, *REST)
def ddp_ranks_stay_bitwise_equal(world: World) -> None:
    """In float32, with a loss that differs between the ranks."""
    model = DistributedDataParallel(Net(dtype=torch.float32))
    optimizer = make_optimizer(world.optimizer, model)
    start = gather_all(model)
    train(model, optimizer, 0, 4, world.rank, world.size)
    after = gather_all(model)
    assert_ranks_equal(after)
    # A tensor of one number may come back to where it was: steps of one size cancel.
    assert not any(torch.equal(after[name], start[name]) for name in start if start[name].numel() > 1)


@check("lstm", "small_fc", also=("celo2", "velo", *REST))
def ddp_ranks_round_alike(world: World) -> None:
    """Stochastic rounding of bfloat16, where every rank has a random seed of its own."""
    torch.manual_seed(world.rank)
    model = DistributedDataParallel(Net(dtype=torch.bfloat16))
    optimizer = make_optimizer(world.optimizer, model.module, stochastic_rounding=True)
    start = gather_all(model)
    train(model, optimizer, 0, 4, world.rank, world.size)
    after = gather_all(model)
    assert_ranks_equal(after)
    # A tensor of one number may come back to where it was: steps of one size cancel.
    assert not any(torch.equal(after[name], start[name]) for name in start if start[name].numel() > 1)


@check(CONTROL, *RULES_ASKED, also=REST)
def ddp_equals_one_process_on_the_whole_batch(world: World) -> None:
    model = DistributedDataParallel(Net())
    optimizer = make_optimizer(world.optimizer, model.module)
    train(model, optimizer, 0, 5, world.rank, world.size)
    expected, _ = train_alone(world.optimizer, 5)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()))


@check(CONTROL, "velo", also=("lstm", "small_fc", "celo2", "celo"))
def ddp_with_a_closure_equals_one_process(world: World) -> None:
    """The closure's loss is the rank's own; what a rule reads is the average."""
    model = DistributedDataParallel(Net())
    optimizer = make_optimizer(world.optimizer, model.module)
    for step in range(4):
        x, y = make_batch(step, world.rank, world.size)
        calls = []

        def closure(x: Tensor = x, y: Tensor = y, calls: list[Tensor] = calls) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            calls.append(loss)
            return loss

        assert optimizer.step(closure) is calls[0]
        assert len(calls) == 1
    assert_ranks_equal(gather_all(model))
    expected, _ = train_alone(world.optimizer, 4)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()))


class Branches(nn.Module):
    """A layer for each step in turn; the second layer is used by rank 0 alone, the third by none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.extra = nn.ModuleList(nn.Linear(1, 1, dtype=torch.float64) for _ in range(3))
        for layer in self.extra:
            for p in layer.parameters():
                p.data.fill_(0.5)

    def forward(self, x: Tensor, first_half: bool, step: int) -> Tensor:
        """Every other step uses the first layer, too."""
        y: Tensor = self.net(x)
        y = y + self.extra[0](y) if step % 2 else y
        return y + self.extra[1](y) if first_half else y


@check(CONTROL, *RULES_ASKED)
def ddp_with_unused_parameters_equals_one_process(world: World) -> None:
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    alone = Branches()
    optimizers = [make_optimizer(world.optimizer, m) for m in (model.module, alone)]
    for step in range(4):
        x, y = make_batch(step, world.rank, world.size)
        optimizers[0].zero_grad()
        loss = F.mse_loss(model(x, world.rank == 0, step), y)
        loss.backward()
        assert (model.module.extra[0].weight.grad is None) == (step % 2 == 0)
        assert model.module.extra[2].weight.grad is None
        step_with(optimizers[0], loss)
        optimizers[1].zero_grad()
        parts = [make_batch(step, rank, 2) for rank in range(2)]
        loss = torch.stack([F.mse_loss(alone(x, rank == 0, step), y) for rank, (x, y) in enumerate(parts)]).mean()
        loss.backward()
        step_with(optimizers[1], loss)
    after, expected, start = (gather_all(m) for m in (model, alone, Branches()))
    assert_ranks_equal(after)
    unused = [name for name in after if name.startswith("extra.2")]
    assert_equal({name: after.pop(name) for name in unused}, {name: start[name] for name in unused})
    assert_moved_alike(after, {name: expected[name] for name in after}, start)


@check(CONTROL, *RULES_ASKED)
def ddp_with_uneven_inputs_equals_one_process(world: World) -> None:
    """The first rank runs out of batches; the loss is not given, as the rank that has stopped has none."""
    model = DistributedDataParallel(Net())
    optimizer = make_optimizer(world.optimizer, model.module)
    batches = [2, 5]
    with model.join():
        for step in range(batches[world.rank]):
            x, y = make_batch(step, world.rank, world.size)
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    alone = Net()
    optimizer = make_optimizer(world.optimizer, alone)
    for step in range(max(batches)):
        optimizer.zero_grad()
        for rank in range(2):
            if step < batches[rank]:
                x, y = make_batch(step, rank, 2)
                (F.mse_loss(alone(x), y) / 2).backward()
        optimizer.step()
    assert_ranks_equal(gather_all(model))
    assert_moved_alike(gather_all(model), gather_all(alone), gather_all(Net()))


@check(*READ_LOSS)
def unreduced_loss_is_the_ranks_own(world: World) -> None:
    """reduce_loss=False: ranks that are told different losses go different ways, without talking to each other."""
    model = Net()
    optimizer = make_optimizer(world.optimizer, model, reduce_loss=False)
    for step in range(4 + world.rank):  # a collective would not be answered
        x, y = make_batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if step < 4:
            falls_or_rises = step * (2 * world.rank - 1)  # what VeLO chooses by the loss has two values only
            optimizer.step(loss=10.0**falls_or_rises)  # type: ignore[call-arg]
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, gather_all(model))
    assert not torch.equal(every[0]["hidden.weight"], every[1]["hidden.weight"])


# -- ZeroRedundancyOptimizer ---------------------------------------------------------------------------------------


def make_zero(kind: str, params: list[nn.Parameter], **options: Any) -> ZeroRedundancyOptimizer:
    options = {"lr": RATES[kind]} | options
    if kind == CONTROL:
        return ZeroRedundancyOptimizer(params, torch.optim.AdamW, **options)
    return ZeroRedundancyOptimizer(params, LearnedOptimizer, rule=make_rule(kind), num_steps=PLANNED, **options)


def make_plain(kind: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == CONTROL:
        return torch.optim.AdamW(params, lr=RATES[kind])
    return LearnedOptimizer(params, make_rule(kind), lr=RATES[kind], num_steps=PLANNED)


def train_whole(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    """Whole batches on every rank."""
    for step in range(first, first + steps):
        x, y = make_batch(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(**({} if kind == CONTROL else {"loss": loss.detach()}))


# Rules whose tensors see each other (velo, hierarchical_rnn) see those of their own rank. So does celo's clock, which
# is the run's where a group is added late.
@check(CONTROL, "lstm", "small_fc", "celo2")
def zero_redundancy_equals_the_plain_optimizer(world: World) -> None:
    """Also with a group added on the way."""
    models = [Net() for _ in range(2)]
    for model, make in zip(models, (make_zero, make_plain), strict=True):
        params = list(model.parameters())
        optimizer = make(world.optimizer, params[:-2])
        train_whole(world.optimizer, model, optimizer, 0, 2)
        optimizer.add_param_group({"params": params[-2:], "lr": RATES[world.optimizer] / 2})
        train_whole(world.optimizer, model, optimizer, 2, 3)
    assert_ranks_equal(gather_all(models[0]))
    assert_moved_alike(gather_all(models[0]), gather_all(models[1]), gather_all(Net()))


@check("velo", *REST)
def zero_redundancy_ranks_stay_bitwise_equal(world: World) -> None:
    model = Net()
    train_whole(world.optimizer, model, make_zero(world.optimizer, list(model.parameters())), 0, 4)
    after, start = gather_all(model), gather_all(Net())
    assert_ranks_equal(after)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not any(torch.equal(after[name], start[name]) for name in start)


@check(CONTROL, *RULES_ASKED)
def zero_redundancy_resumes_bitwise_from_consolidated_state(world: World) -> None:
    model = Net()
    zero = make_zero(world.optimizer, list(model.parameters()))
    train_whole(world.optimizer, model, zero, 0, 3)
    zero.consolidate_state_dict(to=0)
    # copied: loading shares the tensors
    saved: list[Any] = [deepcopy((zero.state_dict(), model.state_dict())) if world.rank == 0 else None]
    dist.broadcast_object_list(saved)
    other = Net()
    other.load_state_dict(saved[0][1])
    resumed = make_zero(world.optimizer, list(other.parameters()))
    resumed.load_state_dict(saved[0][0])
    train_whole(world.optimizer, model, zero, 3, 3)
    train_whole(world.optimizer, other, resumed, 3, 3)
    assert_equal(gather_all(other), gather_all(model))
