"""Parameters of which every process holds a part: DTensors, as `fully_shard` and tensor parallelism make them.

A rule's stages run on the local parts. Their sums are added up over the processes, twice per step for all parameters
together, so that a sharded step equals the unsharded one. State of the parameter's shape is sharded as the parameter;
what rows, columns or the whole tensor share is held by every process. Whole-tensor stages (`finish`) gather the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lopt.rules.layout import Layout, find_layout
from lopt.rules.stages import Accumulators, Means, Steppable, Sum, divide_sums


class Shard:
    """Where this process's part of a DTensor lies in the whole, and what passes between the two.

    Attributes:
        layout: of the whole parameter.
        shape: of the part; a scalar counts as a vector of one element.
        offset: of the part's first element in the whole.
    Raises:
        RuntimeError: a placement other than `Shard` and `Replicate`.
    """

    def __init__(self, p: DTensor) -> None:
        for placement in p.placements:
            if type(placement) not in (ShardPlacement, Replicate):
                raise RuntimeError(
                    f"LearnedOptimizer does not support the placement {placement!r} of a parameter of shape "
                    f"{list(p.shape)}; it supports Shard and Replicate. Redistribute the parameter."
                )
        self.mesh, self.placements = p.device_mesh, p.placements
        self.layout = find_layout(tuple(p.shape))
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        self.shape, self.offset = tuple(shape) or (1,), tuple(offset) or (0,)

    @cached_property
    def mesh_dims(self) -> tuple[int, ...]:
        """The mesh's dimensions over which the parameter is sharded; sums go over these, as replicas hold the same."""
        return tuple(dim for dim, placement in enumerate(self.placements) if isinstance(placement, ShardPlacement))

    def take(self, x: Tensor) -> Tensor:
        """The part of a tensor that is here, as a view; undoes `gather`.

        Args:
            x: `[..., *shape of the whole]`; dimensions of size 1 are shared and stay.
        """
        for axis in self.layout.axes:
            if x.shape[axis] != 1:
                x = x.narrow(axis, self.offset[axis], self.shape[axis])
        return x

    def wrap(self, local: Tensor) -> DTensor:
        """A DTensor of which this process has the part `local`, for state and for gathering; communicates nothing.

        Args:
            local: `[..., *shape of the part]`.
        Returns:
            `[..., *shape of the whole]`, placed as the parameter.
        """
        extra = local.ndim - len(self.shape)
        shape = torch.Size((*local.shape[:extra], *self.layout.shape))
        placements: list[Placement] = [
            ShardPlacement(p.dim % self.layout.ndim + extra) if isinstance(p, ShardPlacement) else p
            for p in self.placements
        ]
        strides = torch.empty(shape, device="meta", dtype=torch.float32).stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=strides)

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, from every process's part, for stages that need it; all processes have to call this."""
        return self.wrap(local).full_tensor()

    def place(self, total: Sum) -> Tensor:
        """A sum over this process's elements, with zeros where the rows or columns of other processes are.

        Such sums are added up over the processes as they are.

        Args:
            total: over some axes of the part, the others of which may be sharded.
        """
        value, axes = total
        shape = [1 if axis in axes else self.layout.shape[axis] for axis in self.layout.axes]
        whole = value.new_zeros(*value.shape[: value.ndim - self.layout.ndim], *shape)
        part = whole
        for axis in self.layout.axes:
            if axis not in axes:
                part = part.narrow(axis, self.offset[axis], self.shape[axis])
        part.copy_(value)
        return whole


def to_local(x: Tensor, like: Tensor | None = None) -> Tensor:
    """This process's part of a DTensor; other tensors as they are.

    Args:
        like: a DTensor as which it is placed before, if it is not; that communicates.
    """
    if isinstance(x, DTensor) and isinstance(like, DTensor) and x.placements != like.placements:
        x = x.redistribute(like.device_mesh, like.placements)
    return x.to_local() if isinstance(x, DTensor) else x


def add_up(values: Sequence[Tensor], shards: Sequence[Shard | None]) -> list[Tensor]:
    """Sums over the processes that share each tensor: one collective per mesh dimension and dtype for all of them.

    Args:
        values: a tensor for each parameter, of any shapes.
        shards: of the parameters; None: its value is a sum already.
    Returns:
        Tensors of the same shapes, equal on all processes; all of these have to call this with the same parameters.
    """
    result = list(values)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (value, shard) in enumerate(zip(values, shards, strict=True)):
        if shard is not None and shard.mesh_dims:
            groups.setdefault((shard.mesh, shard.mesh_dims, value.dtype), []).append(i)
    # A collective is dear whatever its size: values that go over the same processes are sent as one.
    for indices in groups.values():
        flat = torch.cat([values[i].reshape(-1) for i in indices])
        shard = shards[indices[0]]
        assert shard is not None
        for dim in shard.mesh_dims:
            dist.all_reduce(flat, group=shard.mesh.get_group(dim))
        pieces = torch.split(flat, [values[i].numel() for i in indices])
        for i, piece in zip(indices, pieces, strict=True):
            result[i] = piece.view(values[i].shape)
    return result


def to_means(tensors: Sequence[Steppable], sums: Sequence[Mapping[str, Sum]]) -> list[Means]:
    """The means of a step's tensors, as `divide_sums` makes them, where sums of shards are added up over processes.

    Args:
        sums: for each tensor, over this process's elements.
    Returns:
        Means over the whole parameters, equal on all processes.
    """
    shards = [getattr(tensor, "shard", None) for tensor in tensors]
    if not any(shards):
        return divide_sums(tensors, sums)
    # All sums of all tensors go into one list, and so into one collective.
    flat = [(i, key) for i, of_tensor in enumerate(sums) for key in of_tensor]
    values = [sums[i][key].value if (s := shards[i]) is None else s.place(sums[i][key]) for i, key in flat]
    totals = add_up(values, [shards[i] for i, _ in flat])
    whole: list[dict[str, Sum]] = [{} for _ in sums]
    for (i, key), total in zip(flat, totals, strict=True):
        whole[i][key] = sums[i][key]._replace(value=total)
    return divide_sums(tensors, whole)


def init_parts(
    make: Callable[[Tensor, Layout], Accumulators], p: Tensor, shared: Sequence[str], lines: Sequence[str]
) -> Accumulators:
    """What `make(p, layout)` makes for the whole parameter, of which every process has its part.

    Elements' own state becomes a DTensor sharded as the parameter; what is shared is a plain tensor on every process.

    Args:
        shared: keys of what belongs to the tensor as a whole.
        lines: keys of what rows or columns share; zeros at first.
    """
    # Shapes of the whole tell what is an element's own: a part of one row looks like what rows share.
    shard = Shard(cast(DTensor, p))
    whole = make(torch.empty(shard.layout.shape, device="meta", dtype=torch.float32), shard.layout)
    local = to_local(p).contiguous().view(shard.shape)
    parts = make(local, replace(shard.layout, shape=shard.shape))
    result: Accumulators = {}
    for key, meta in whole.items():
        if key in lines:  # the part may have others: which there are may depend on the sides
            result[key] = local.new_zeros(meta.shape, dtype=meta.dtype)
        elif key not in shared and tuple(meta.shape[meta.ndim - shard.layout.ndim :]) == shard.layout.shape:
            result[key] = shard.wrap(parts[key])
        else:
            result[key] = parts[key]
    return result
