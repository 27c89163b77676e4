"""Checks of sharded parameters: FSDP2, and DTensors of every placement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import (
    CONTROL,
    PLANNED,
    RATES,
    REST,
    RULES_ASKED,
    Net,
    World,
    assert_equal,
    assert_moved_alike,
    check,
    draw,
    gather,
    gather_all,
    make_optimizer,
    make_rule,
    step_with,
    train,
    train_alone,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from lopt import LearnedOptimizer

Params = dict[str, nn.Parameter]


def make_sharded(mesh: DeviceMesh, with_scalar: bool = False) -> Net:
    """The network under FSDP2, its hidden layer as a unit of its own; a scalar, which FSDP2 refuses, stays plain."""
    model = Net(with_scalar)
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.scale} if with_scalar else None)
    return model


# -- FSDP2 ---------------------------------------------------------------------------------------------------------


@check(CONTROL, *RULES_ASKED, also=REST)
def fsdp2_equals_one_process(world: World) -> None:
    """Also where a dimension does not divide by the ranks, or a rank has nothing of a parameter."""
    model = make_sharded(init_device_mesh("cpu", (world.size,)))
    sizes = {name: p.to_local().numel() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert len(sizes) == 7
    assert (sizes["out.weight"] == 0) == (world.rank == 1)
    optimizer = make_optimizer(world.optimizer, model)
    train(model, optimizer, 0, 5, world.rank, world.size)
    expected, _ = train_alone(world.optimizer, 5)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()), world.optimizer)


@check(CONTROL, "velo", also=("lstm", "small_fc", "celo2", *REST))
def fsdp2_beside_plain_parameters_equals_one_process(world: World) -> None:
    model = make_sharded(init_device_mesh("cpu", (world.size,)), with_scalar=True)
    assert not isinstance(model.scale, DTensor)
    optimizer = make_optimizer(world.optimizer, model)
    train(model, optimizer, 0, 5, world.rank, world.size)
    expected, _ = train_alone(world.optimizer, 5, with_scalar=True)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net(with_scalar=True)), world.optimizer)


@check(also=(CONTROL, *RULES_ASKED, *REST), sizes=(4,))
def fsdp2_with_replicas_equals_one_process(world: World) -> None:
    """HSDP: two copies of the model, each sharded over two ranks."""
    model = make_sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    optimizer = make_optimizer(world.optimizer, model)
    train(model, optimizer, 0, 5, world.rank, world.size)
    expected, _ = train_alone(world.optimizer, 5)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()), world.optimizer)


@check(CONTROL, *RULES_ASKED, also=REST)
def state_is_sharded_as_the_parameters_are(world: World) -> None:
    """What a rule keeps for each element is a DTensor placed as its parameter."""
    model = make_sharded(init_device_mesh("cpu", (world.size,)))
    optimizer = make_optimizer(world.optimizer, model)
    train(model, optimizer, 0, 1, world.rank, world.size)
    p = model.hidden.weight  # no dimension of 1, by which other state could look like an element's
    assert isinstance(p, DTensor)
    own = [value for value in optimizer.state[p].values() if value.shape[-p.ndim :] == p.shape]
    assert own
    for value in own:
        assert isinstance(value, DTensor), type(value)
        assert value.to_local().numel() == value.numel() // p.numel() * p.to_local().numel()


@check("small_fc", "celo2", also=("lstm", "velo", *REST))
def fsdp2_one_tensor_at_a_time_equals_one_process(world: World) -> None:
    """foreach=False, against tensors of equal shape together."""
    model = make_sharded(init_device_mesh("cpu", (world.size,)))
    optimizer = make_optimizer(world.optimizer, model, foreach=False, maximize=False)
    train(model, optimizer, 0, 3, world.rank, world.size)
    expected, _ = train_alone(world.optimizer, 3)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()), world.optimizer)


@check("small_fc", "celo2", also=(CONTROL, "lstm", "velo", *REST))
def tensor_parallel_equals_one_process(world: World) -> None:
    """Layers split by columns and by rows; their other parameters, and those of the other layers, are not DTensors."""
    model = Net()
    plan = {
        "hidden": ColwiseParallel(output_layouts=Replicate()),
        "out": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (world.size,)), plan)
    placements = {name: p.placements for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert placements["hidden.weight"] == (Shard(0),)
    assert placements["out.weight"] == (Shard(1),)
    optimizer = make_optimizer(world.optimizer, model)
    train(model, optimizer, 0, 4)  # every rank has the whole batch
    expected, _ = train_alone(world.optimizer, 4)
    assert_moved_alike(gather_all(model), gather_all(expected), gather_all(Net()), world.optimizer)


@check("velo", also=("lstm", "small_fc", "celo2"))
def groups_with_numbers_of_their_own_equal_one_process(world: World) -> None:
    """A group for each parameter, sharded or not, of the rule or of AdamW."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": [named]} for named in model.named_parameters()]
        for i, group in enumerate(groups):
            group |= {"lr": RATES[world.optimizer] * (1 + i / 4), "weight_decay": 0.01 * i, "num_steps": PLANNED + i}
            if i % 3 == 0:
                group |= {"rule": "adamw", "lr": 0.01 * (i + 1), "betas": (0.5 + 0.05 * i, 0.9), "eps": 0.1 * (i + 1)}
        return LearnedOptimizer(groups, make_rule(world.optimizer), num_steps=PLANNED)

    model, alone = make_sharded(init_device_mesh("cpu", (world.size,)), with_scalar=True), Net(with_scalar=True)
    train(model, make(model), 0, 3, world.rank, world.size)
    train(alone, make(alone), 0, 3)
    assert_moved_alike(gather_all(model), gather_all(alone), gather_all(Net(with_scalar=True)), world.optimizer)


@check("base")
def open_run_cools_down_as_in_one_process(world: World) -> None:
    """Beside a planned group."""

    def run(model: nn.Module, part: int = 0, parts: int = 1) -> None:
        named = list(model.named_parameters())
        groups: list[dict[str, Any]] = [{"params": named[:2], "num_steps": PLANNED}, {"params": named[2:]}]
        optimizer = LearnedOptimizer(groups, make_rule("base"))
        train(model, optimizer, 0, 3, part, parts)
        optimizer.cool_down(4)
        train(model, optimizer, 3, 3, part, parts)
        assert [group["num_steps"] for group in optimizer.param_groups] == [PLANNED, 7]

    model, alone = make_sharded(init_device_mesh("cpu", (world.size,))), Net()
    run(model, world.rank, world.size)
    run(alone)
    assert_moved_alike(gather_all(model), gather_all(alone), gather_all(Net()), world.optimizer)


# -- DTensors ------------------------------------------------------------------------------------------------------

SHAPES = {
    "uneven": (3, 5),
    "row": (1, 4),
    "column": (5, 1),
    "long": (2, 40),
    "vector": (7,),
    "single": (1,),
    "conv": (3, 2, 3, 3),
    "scalar": (),
}


def make_pair(mesh: DeviceMesh, place: Callable[[int], Sequence[Placement]]) -> tuple[Params, Params]:
    """Plain and distributed parameters; `place` tells the placements for a number of dimensions."""
    plain = {name: nn.Parameter(draw(index, *shape)) for index, (name, shape) in enumerate(SHAPES.items())}
    return plain, {
        name: nn.Parameter(distribute_tensor(p.detach().clone(), mesh, place(p.ndim))) for name, p in plain.items()
    }


def step_pair(
    world: World, plain: Params, sharded: Params, steps: int, as_placed: Callable[[Tensor, DTensor], Tensor]
) -> None:
    """The same gradients for both; `as_placed` distributes one for a parameter."""
    optimizers = [make_optimizer(world.optimizer, list(params.items())) for params in (plain, sharded)]
    for step in range(steps):
        for index, (name, p) in enumerate(plain.items()):
            other = sharded[name]
            assert isinstance(other, DTensor)
            p.grad = draw(100 * step + index + 50, *p.shape)
            other.grad = as_placed(p.grad, other)
        for optimizer in optimizers:
            step_with(optimizer, 2.0 - 0.1 * step)


def place_alike(g: Tensor, p: DTensor) -> Tensor:
    return distribute_tensor(g, p.device_mesh, p.placements)


def compare_placements(world: World, mesh: DeviceMesh, place: Callable[[int], Sequence[Placement]]) -> None:
    plain, sharded = make_pair(mesh, place)
    start = {name: gather(p).clone() for name, p in plain.items()}
    step_pair(world, plain, sharded, 5, place_alike)  # odd: steps of one size do not cancel
    for name, p in sharded.items():
        assert isinstance(p, DTensor)
        assert p.placements == tuple(place(plain[name].ndim))
    assert_moved_alike(
        *({name: gather(p) for name, p in params.items()} for params in (sharded, plain)), start, world.optimizer
    )


@check(*RULES_ASKED, also=(CONTROL, *REST))
def first_dimension_sharded_equals_plain(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    compare_placements(world, mesh, lambda ndim: [Shard(0) if ndim else Replicate()])


@check(*RULES_ASKED, also=(CONTROL, *REST))
def second_dimension_sharded_equals_plain(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    compare_placements(world, mesh, lambda ndim: [Shard(1) if ndim > 1 else Replicate()])


@check("small_fc", "celo2", also=(CONTROL, "lstm", "velo", *REST))
def last_dimension_sharded_equals_plain(world: World) -> None:
    """Of convolutions, the window."""
    mesh = init_device_mesh("cpu", (world.size,))
    compare_placements(world, mesh, lambda ndim: [Shard(ndim - 1) if ndim else Replicate()])


@check("velo", also=(CONTROL, "lstm", "small_fc", "celo2", *REST))
def replicated_equals_plain(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    compare_placements(world, mesh, lambda ndim: [Replicate()])


def place_on_grid(ndim: int) -> list[Placement]:
    """Both dimensions of matrices; vectors along the mesh's second dimension."""
    return [Shard(0) if ndim > 1 else Replicate(), Shard(min(ndim, 2) - 1) if ndim else Replicate()]


@check("celo2", also=(CONTROL, "lstm", "small_fc", "velo", *REST))
def two_dimensional_mesh_of_two_equals_plain(world: World) -> None:
    compare_placements(world, init_device_mesh("cpu", (2, 1)), place_on_grid)
    compare_placements(world, init_device_mesh("cpu", (1, 2)), place_on_grid)


@check(also=(CONTROL, *RULES_ASKED, *REST), sizes=(4,))
def two_dimensional_mesh_of_four_equals_plain(world: World) -> None:
    """Both dimensions sharded; one dimension sharded twice; copies of shards."""
    mesh = init_device_mesh("cpu", (2, 2))
    compare_placements(world, mesh, place_on_grid)
    compare_placements(world, mesh, lambda ndim: [Shard(0), Shard(0)] if ndim else [Replicate(), Replicate()])
    compare_placements(world, mesh, lambda ndim: [Replicate(), Shard(0) if ndim else Replicate()])


@check("velo", also=("lstm", "small_fc", "celo2", *REST))
def meshes_of_two_shapes_in_one_optimizer_equal_plain(world: World) -> None:
    """Parameters on meshes of their own, whole ones beside them."""
    flat, grid = init_device_mesh("cpu", (world.size,)), init_device_mesh("cpu", (1, world.size))
    plain, sharded = make_pair(flat, lambda ndim: [Shard(0) if ndim else Replicate()])
    start = {name: gather(p).clone() for name, p in plain.items()}
    for name in ("uneven", "conv"):
        sharded[name] = nn.Parameter(distribute_tensor(start[name].clone(), grid, [Replicate(), Shard(1)]))
    step_pair(world, plain, sharded, 5, place_alike)
    assert_moved_alike(
        *({name: gather(p) for name, p in params.items()} for params in (sharded, plain)), start, world.optimizer
    )


@check("small_fc", also=(CONTROL, "lstm", "celo2", "velo", *REST))
def gradient_of_another_placement_equals_plain(world: World) -> None:
    """Tensor parallelism leaves gradients of replicated parameters as partial sums."""
    mesh = init_device_mesh("cpu", (world.size,))

    def split_sum(g: Tensor, p: DTensor) -> Tensor:
        return DTensor.from_local(g * (0.25 + 0.5 * world.rank), mesh, [Partial()])  # 0.25 + 0.75

    plain, sharded = make_pair(mesh, lambda ndim: [Replicate()])
    start = {name: gather(p).clone() for name, p in plain.items()}
    step_pair(world, plain, sharded, 5, split_sum)
    assert_moved_alike(
        *({name: gather(p) for name, p in params.items()} for params in (sharded, plain)), start, world.optimizer
    )


@check(*RULES_ASKED, also=REST)
def nan_in_the_shard_of_one_rank_skips_the_tensor_on_all(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    _, sharded = make_pair(mesh, lambda ndim: [Shard(0) if ndim else Replicate()])
    optimizer = make_optimizer(world.optimizer, list(sharded.items()))
    assert isinstance(optimizer, LearnedOptimizer)
    ill = ("uneven", "vector")

    def step(seed: int, spoil: bool) -> dict[str, Tensor]:
        for index, p in enumerate(sharded.values()):
            assert isinstance(p, DTensor)
            p.grad = place_alike(draw(seed + index, *p.shape), p)
        if spoil and world.rank == 0:
            for name in ill:
                grad: Any = sharded[name].grad
                grad.to_local().view(-1)[0] = float("nan")
        optimizer.step(loss=1.0)
        return {name: gather(p).clone() for name, p in sharded.items()}

    def remember(names: Sequence[str]) -> dict[str, Tensor]:
        state = optimizer.state
        return {f"{n} {key}": gather(v).clone() for n in names for key, v in state[sharded[n]].items()}

    before, kept = step(100, spoil=False), remember(ill)
    after = step(200, spoil=True)
    assert_equal({name: after[name] for name in ill}, {name: before[name] for name in ill})
    assert_equal(remember(ill), kept)
    assert not any(torch.equal(after[name], before[name]) for name in SHAPES if name not in ill)
    assert optimizer.report().skipped == len(ill)
    last = step(300, spoil=False)
    assert not any(torch.equal(last[name], after[name]) for name in SHAPES)
    assert all(bool(value.isfinite().all()) for value in last.values())


@check("small_fc", "velo", also=("lstm", "celo2", *REST))
def huge_entry_in_the_shard_of_one_rank_is_limited_and_counted_on_all(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    plain, sharded = make_pair(mesh, lambda ndim: [Shard(0) if ndim else Replicate()])
    start = {name: gather(p).clone() for name, p in plain.items()}
    optimizers = [make_optimizer(world.optimizer, list(params.items())) for params in (plain, sharded)]
    for step, size in enumerate((1.0, 1e25, 3e38, 1.0)):
        for index, (name, p) in enumerate(plain.items()):
            p.grad, other = draw(100 * step + index, *p.shape), sharded[name]
            assert isinstance(other, DTensor)
            p.grad.view(-1)[0] *= size
            other.grad = place_alike(p.grad, other)
        for optimizer in optimizers:
            assert isinstance(optimizer, LearnedOptimizer)
            step_with(optimizer, 1.0)
            assert optimizer.report().limited == min(step, 2) * len(SHAPES)
            tensors = [value for state in optimizer.state.values() for value in state.values()]
            assert all(bool(gather(value).isfinite().all()) for value in tensors)
    assert_moved_alike(
        *({name: gather(p) for name, p in params.items()} for params in (sharded, plain)), start, world.optimizer
    )


@check("small_fc", "velo", also=("lstm", "celo2", *REST))
def nan_in_the_shard_of_one_rank_raises_on_all(world: World) -> None:
    """nonfinite="raise": no rank is left waiting for one that has raised, and nothing has changed."""
    model = make_sharded(init_device_mesh("cpu", (world.size,)))
    optimizer = make_optimizer(world.optimizer, model, nonfinite="raise")
    train(model, optimizer, 0, 1, world.rank, world.size)
    before = gather_all(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if world.rank == 0:
        grad: Any = model.hidden.weight.grad
        grad.to_local()[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"hidden\.weight"):
        step_with(optimizer, 1.0)
    assert_equal(gather_all(model), before)
    train(model, optimizer, 1, 1, world.rank, world.size)


@check("lstm", also=("small_fc", "celo2", "velo", *REST))
def zero_learning_rate_changes_no_shard(world: World) -> None:
    model = make_sharded(init_device_mesh("cpu", (world.size,)))
    start = gather_all(model)
    optimizer = make_optimizer(world.optimizer, model, lr=0.0, weight_decay=0.1)
    train(model, optimizer, 0, 2, world.rank, world.size)
    assert_equal(gather_all(model), start)


@check("lstm", "small_fc")
def placements_that_cannot_be_stepped_are_refused_by_name(world: World) -> None:
    """Partial sums are no parameters; shards in strides (FSDP2 over tensor parallelism) are not supported."""
    line, grid = init_device_mesh("cpu", (world.size,)), init_device_mesh("cpu", (1, world.size))
    cases = {
        r"placement P(artial)?\(": DTensor.from_local(torch.ones(4, 2), line, [Partial()], run_check=False),
        "placement _S": DTensor.from_local(
            torch.ones(2, 2), grid, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False
        ),
    }
    for message, tensor in cases.items():
        p = nn.Parameter(tensor)

        def make_and_step(p: nn.Parameter = p) -> None:
            optimizer = make_optimizer(world.optimizer, [("p", p)])
            p.grad = torch.ones_like(p)
            optimizer.step()

        with pytest.raises(RuntimeError, match=message):
            make_and_step()
    dist.barrier()
