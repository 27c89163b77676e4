"""Checks of distributed checkpoints: torch.distributed.checkpoint, with other numbers of processes on the way."""

from __future__ import annotations

import warnings
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_shards import make_sharded
from distributed_workers import (
    CONTROL,
    REST,
    RULES_ASKED,
    TOLERANCE,
    Net,
    World,
    assert_equal,
    assert_moved_alike,
    check,
    gather,
    gather_all,
    make_optimizer,
    make_rule,
    train,
    train_alone,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

from lopt import LearnedOptimizer

Pair = tuple[nn.Module, torch.optim.Optimizer]


def start(world: World) -> Pair:
    """A new model, sharded if there is more than one process, and its optimizer."""
    model = make_sharded(init_device_mesh("cpu", (world.size,))) if world.size > 1 else Net()
    return model, make_optimizer(world.optimizer, model)


def save(world: World, pair: Pair, name: str, options: StateDictOptions | None = None) -> None:
    model, optimizer = get_state_dict(*pair, options=options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=world.folder / name)


def load(world: World, pair: Pair, name: str, options: StateDictOptions | None = None) -> None:
    model, optimizer = get_state_dict(*pair, options=options)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=world.folder / name)
    set_state_dict(*pair, model_state_dict=model, optim_state_dict=optimizer, options=options)


def read_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state, on every rank."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found |= {f"{name} {key}": gather(torch.as_tensor(v)).clone() for key, v in optimizer.state[p].items()}
    return found


def assert_state_alike(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to an entry's largest number."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape
        apart = float((value.double() - expected[name].double()).abs().max())
        size = float(expected[name].abs().max())
        assert apart <= TOLERANCE * size, f"{name}: {apart:.1e} of {size:.1e} apart"


def assert_go_on_alike(world: World, pair: Pair, other: Pair, first: int) -> None:
    """Bit for bit: state, and parameters after more steps."""
    assert_equal(gather_all(other[0]), gather_all(pair[0]))
    assert_equal(read_state(other[1]), read_state(pair[1]))
    before = gather_all(pair[0])
    for each in (pair, other):
        train(*each, first, 3, world.rank, world.size)
    after = gather_all(pair[0])
    assert_equal(gather_all(other[0]), after)
    assert not any(torch.equal(after[name], before[name]) for name in after)


# -- saved and loaded by as many processes -------------------------------------------------------------------------


@check(*RULES_ASKED, also=(CONTROL, *REST))
def sharded_checkpoint_resumes_bitwise(world: World) -> None:
    pair = start(world)
    train(*pair, 0, 3, world.rank, world.size)
    save(world, pair, "checkpoint")
    other = start(world)
    load(world, other, "checkpoint")
    assert_go_on_alike(world, pair, other, 3)


@check("base")
def checkpoint_of_a_run_that_cools_down_resumes_bitwise(world: World) -> None:
    """Loaded by an optimizer that knows of no end yet; in both forms."""
    for name, flat in (("nested", False), ("flat", True)):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        pairs = []
        for _ in range(2):
            model, _ = start(world)
            pairs.append((model, LearnedOptimizer(model.named_parameters(), make_rule("base"))))
        pair, other = pairs
        train(*pair, 0, 2, world.rank, world.size)
        pair[1].cool_down(9)
        train(*pair, 2, 1, world.rank, world.size)
        pair[1].cool_down(5)
        save(world, pair, name, options)
        load(world, other, name, options)
        assert all(group["num_steps"] == 8 and group["cool_down"] == (2, 9 * 5 / 8) for group in other[1].param_groups)
        assert_go_on_alike(world, pair, other, 3)


@check("velo", also=(CONTROL, "lstm", "small_fc", "celo2", *REST))
def flattened_checkpoint_resumes_bitwise(world: World) -> None:
    """In this form, values in `state` may only be tensors and numbers."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    pair = start(world)
    train(*pair, 0, 3, world.rank, world.size)
    save(world, pair, "checkpoint", options)
    other = start(world)
    load(world, other, "checkpoint", options)
    assert_go_on_alike(world, pair, other, 3)


@check("velo", also=(CONTROL, "lstm", "small_fc", "celo2", *REST))
def whole_state_on_the_first_rank_resumes_bitwise(world: World) -> None:
    """full_state_dict with cpu_offload: torch.save on one rank, broadcast when loaded."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    pair = start(world)
    train(*pair, 0, 3, world.rank, world.size)
    model = get_model_state_dict(pair[0], options=options)
    optimizer = get_optimizer_state_dict(*pair, options=options)
    path = world.folder / "whole.pt"
    if world.rank == 0:
        assert not any(hasattr(v, "placements") for values in optimizer["state"].values() for v in values.values())
        # torch 2.10 gathers with gaps between rows, and loads by broadcasting what has them as if it had none.
        torch.save(tree_map_only(Tensor, Tensor.contiguous, (model, optimizer)), path)
    else:
        assert not optimizer
    dist.barrier()
    model, optimizer = torch.load(path, weights_only=True) if world.rank == 0 else ({}, {})
    other = start(world)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other[0], model, options=options)
    set_optimizer_state_dict(*other, optimizer, options=options)
    assert_go_on_alike(world, pair, other, 3)


@check("celo2", also=(CONTROL, "lstm", "small_fc", "velo", *REST))
def optimizers_own_state_dict_resumes_bitwise(world: World) -> None:
    """Each rank keeps its own shards."""
    pair = start(world)
    train(*pair, 0, 3, world.rank, world.size)
    other = start(world)
    other[0].load_state_dict(pair[0].state_dict())
    other[1].load_state_dict(deepcopy(pair[1].state_dict()))
    assert_go_on_alike(world, pair, other, 3)


@check("small_fc", also=(CONTROL, "lstm", "celo2", "velo", *REST))
def asynchronous_checkpoint_is_of_the_moment_it_was_asked_for(world: World) -> None:
    group = dist.new_group(backend="gloo")  # a background thread may not share the group of the training
    pair = start(world)
    train(*pair, 0, 3, world.rank, world.size)
    model, optimizer = get_state_dict(*pair)
    path = world.folder / "checkpoint"
    future = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=group)
    train(*pair, 3, 2, world.rank, world.size)
    future.result()  # type: ignore[union-attr]
    other = start(world)
    load(world, other, "checkpoint")
    train(*other, 3, 2, world.rank, world.size)
    assert_go_on_alike(world, pair, other, 5)


@check("celo2", "velo", also=("lstm", "small_fc", *REST))
def preparing_a_fresh_optimizer_leaves_its_path_as_it_was(world: World) -> None:
    """To learn what state there is, checkpoints step once with lr 0 and zero gradients; AdamW counts that as a step."""
    for make in (lambda: start(world), lambda: start(world._replace(size=1))):
        pair, other = make(), make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get_optimizer_state_dict(*other)
        assert {int(v) for name, v in read_state(other[1]).items() if name.endswith(" step")} == {0}
        assert_equal(gather_all(other[0]), gather_all(pair[0]))
        for each in (pair, other):
            train(*each, 0, 3, world.rank, world.size)
        assert_equal(gather_all(other[0]), gather_all(pair[0]))
        assert_equal(read_state(other[1]), read_state(pair[1]))


@check("lstm", "celo2")
def checkpoint_of_other_meta_weights_is_refused(world: World) -> None:
    pair = start(world)
    train(*pair, 0, 1, world.rank, world.size)
    other = start(world._replace(optimizer="small_fc"))
    with pytest.raises(ValueError, match=f"small_fc-.*{world.optimizer}-"):
        set_optimizer_state_dict(*other, get_optimizer_state_dict(*pair))


# -- saved and loaded by other numbers of processes ----------------------------------------------------------------


@check("celo2", "velo", also=(CONTROL, "lstm", "small_fc", *REST), sizes=(2, 1, 4))
def checkpoint_goes_on_with_other_numbers_of_processes(world: World) -> None:
    """2 -> 1 -> 4: parameters and state are, at every stage, those of a run that was not interrupted."""
    pair = start(world)
    if world.stage:
        load(world, pair, f"checkpoint-{world.stage - 1}")
        expected, reference = train_alone(world.optimizer, 2 * world.stage)
        assert_state_alike(read_state(pair[1]), read_state(reference))
    train(*pair, 2 * world.stage, 2, world.rank, world.size)
    expected, reference = train_alone(world.optimizer, 2 * (world.stage + 1))
    assert_moved_alike(gather_all(pair[0]), gather_all(expected), gather_all(Net()))
    assert_state_alike(read_state(pair[1]), read_state(reference))
    save(world, pair, f"checkpoint-{world.stage}")
