"""Checks of the guard over several processes."""

from __future__ import annotations

import torch
from distributed_workers import (
    Net,
    World,
    assert_moved_alike,
    assert_ranks_equal,
    check,
    gather_all,
    make_batch,
    make_optimizer,
    train,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lopt import LearnedOptimizer
from lopt.optim.guard.decisions import GuardOptions

STEPS = 12


def train_told(model: nn.Module, optimizer: torch.optim.Optimizer, world: World | None, rising: bool) -> None:
    """Steps on this process's part of the batches, told a loss that from step 6 on rises, on rank 0 only."""
    assert isinstance(optimizer, LearnedOptimizer)
    part, parts = (world.rank, world.size) if world else (0, 1)
    for step in range(STEPS):
        x, y = make_batch(step, part, parts)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        told = 1.0 + (10.0 * (step - 5) if rising and step > 5 and part == 0 else -0.01 * step)
        average = 1.0 + (10.0 * (step - 5) / 2 - 0.005 * step if rising and step > 5 else -0.01 * step)
        optimizer.step(loss=told if world else average)


@check("small_fc", also=("lstm", "celo2", "velo"))
def guarded_ranks_stay_bitwise_equal(world: World) -> None:
    """Though the loss rises on one of them only."""
    model = DistributedDataParallel(Net(dtype=torch.float64))
    optimizer = make_optimizer(world.optimizer, model.module, guard=True)
    train_told(model, optimizer, world, rising=True)
    assert isinstance(optimizer, LearnedOptimizer)
    assert optimizer.report().failures > 0
    assert_ranks_equal(gather_all(model))


@check("small_fc", "celo2", also=("lstm", "velo"))
def guarded_shards_equal_one_process(world: World) -> None:
    """Lengths of steps are those of the whole tensors, and AdamW takes over everywhere."""
    model, alone = Net(), Net()
    mesh = init_device_mesh("cpu", (world.size,))
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [make_optimizer(world.optimizer, net, guard=True) for net in (model, alone)]
    train_told(model, optimizers[0], world, rising=True)
    train_told(alone, optimizers[1], None, rising=True)
    reports = [optimizer.report() for optimizer in optimizers if isinstance(optimizer, LearnedOptimizer)]
    assert reports[0] == reports[1]
    assert reports[0].failures > 0
    assert reports[0].adamw_steps > 0
    assert_moved_alike(gather_all(model), gather_all(alone), gather_all(Net()))


@check("small_fc", also=("lstm", "celo2", "velo"))
def steps_of_shards_are_clipped_by_the_whole_length(world: World) -> None:
    model, alone = Net(), Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    strict = GuardOptions(clip=1.0, seed_norm=1e-4)  # the first step is too long for it
    optimizers = [make_optimizer(world.optimizer, net, guard=strict) for net in (model, alone)]
    train(model, optimizers[0], 0, 2, world.rank, world.size)
    train(alone, optimizers[1], 0, 2)
    reports = [optimizer.report() for optimizer in optimizers if isinstance(optimizer, LearnedOptimizer)]
    assert reports[0] == reports[1]
    assert reports[0].clipped > 0
    assert_moved_alike(gather_all(model), gather_all(alone), gather_all(Net()))
