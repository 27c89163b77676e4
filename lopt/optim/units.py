"""What both backends step: the parameters of an optimizer that have a gradient, with their state and options.

A member is one parameter, a unit are members whose groups differ in numbers at most. Here is also what both backends
read in the same way: these numbers, and what a gradient scaler has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lopt_kernels.launching.segments import upload
from torch import Tensor

if TYPE_CHECKING:
    from lopt.optim.sharding import Shard

STEP, SEED = "step", "seed"  # what a parameter's state holds beside the rule's accumulators
GUARD = "guard_"  # the beginning of the names of what the guard keeps there
NOT_THE_RULES = (STEP, SEED, GUARD)


class Record(NamedTuple):
    """What `LearnedOptimizer._init_group` tells of a parameter in numbers and words, as a graph can hold them.

    Attributes:
        name: the parameter's, or "".
        replica: index of the rule that steps it, in `RuleReplicas`.
        keys: the names of its state's tensors, which are handed over in one list for all parameters.
    """

    name: str
    replica: int
    keys: tuple[str, ...]


class Member(NamedTuple):
    """A parameter that is to be stepped; for DTensors, this process's part of one.

    Attributes:
        name: as the user gave it, or "".
        p, g: parameter and gradient `[*shape]`, of any floating dtypes and strides.
        state: the optimizer's own tensors of it, updated in place.
        shard: where `p` lies in the whole parameter, if it is a part.
    """

    name: str
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    shard: Shard | None

    def pick_accumulators(self) -> dict[str, Tensor]:
        """What a rule sees of the state: the accumulators that it made, without counter, seed and what the guard keeps.

        Returns:
            A new dictionary of the same tensors.
        """
        return {key: value for key, value in self.state.items() if not key.startswith(NOT_THE_RULES)}

    def pick_guards(self) -> dict[str, Tensor]:
        """What the guard sees of the state: AdamW's moments, the snapshot, and the running norm of the steps.

        Returns:
            A new dictionary of the same tensors, empty without a guard.
        """
        return {key: value for key, value in self.state.items() if key.startswith(GUARD)}


class Unit(NamedTuple):
    """Parameters that are stepped alike: k equal ones as one tensor, or a single one.

    Attributes:
        members: at least one; of one shape, dtypes and device where they are stepped together.
        groups: of the optimizer's `param_groups`, one for each member or a single one for all. They differ in numbers
            only; these are read at every step.
    """

    members: Sequence[Member]
    groups: Sequence[Mapping[str, Any]]

    # No properties: the compiler of torch 2.10 cannot look into those of a named tuple.
    def is_stacked(self) -> bool:
        """Whether its tensors have a dimension for the members; the compiler, which fuses, sees one in every unit."""
        return len(self.members) > 1 or torch.compiler.is_compiling()

    def pick(self, indices: Sequence[int]) -> Unit:
        """A unit of some of the members, with their groups."""
        groups = self.groups if len(self.groups) == 1 else [self.groups[i] for i in indices]
        return Unit([self.members[i] for i in indices], groups)

    def read_number(self, name: str, index: int | None = None) -> float | Tensor:
        """An option as it is now: a number where all members agree in one that is not to be waited for.

        Args:
            index: of the number, in an option that has several.
        Returns:
            The number; else a tensor `[]`, or `[k]` with an entry for each member, in at least fp32 and on the device
            of the members.
        """
        p = self.members[0].p
        values = [group[name] if index is None else group[name][index] for group in self.groups]
        # One tensor in all groups, and numbers that are equal, cost as little as a single group.
        if all(value is values[0] for value in values):
            return read_number(values[0], p.device)
        numbers = [read_number(value, p.device) for value in values]
        dtype = torch.promote_types(p.dtype, torch.float32)
        known = [x for x in numbers if isinstance(x, float)]
        if len(known) < len(numbers):
            tensors = (x if isinstance(x, Tensor) else torch.full((), x, device=p.device, dtype=dtype) for x in numbers)
            return torch.stack([x.to(dtype) for x in tensors])
        return known[0] if known.count(known[0]) == len(known) else make_column(known, dtype, p.device)

    def read_adamw(self) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """AdamW's betas and eps, where it steps the members, or the guard has it at hand; each as `read_number`."""
        return self.read_number("betas", 0), self.read_number("betas", 1), self.read_number("eps")


class Scaled(NamedTuple):
    """What `torch.amp.GradScaler` says of the gradients, on their device.

    Attributes:
        unscale: factor that takes its scale out, fp32 `[]`; None: they are not scaled.
        found_inf: not 0 if one of them is not finite, `[]` or `[1]`.
    """

    unscale: Tensor | None
    found_inf: Tensor


def make_member(name: str, p: Tensor, g: Tensor, state: dict[str, Tensor]) -> Member:
    """A parameter as the backends take it: of DTensors the local tensors, with where they lie in the whole.

    Args:
        p, g: of one shape; a DTensor's gradient may be placed otherwise and is redistributed, which communicates.
    Raises:
        RuntimeError: a DTensor placed otherwise than by `Shard` and `Replicate`.
    """
    if not is_sharded(p):
        return Member(name, p, g, state, None)
    sharding = import_sharding()
    local = {key: sharding.to_local(value) for key, value in state.items()}
    return Member(name, sharding.to_local(p), sharding.to_local(g, like=p), local, sharding.Shard(p))


def make_members(
    params: Sequence[Tensor], grads: Sequence[Tensor], values: Sequence[Tensor], records: Sequence[Record]
) -> dict[int, list[Member]]:
    """A group's parameters as members, by the rule that steps them, out of the lists that `_init_group` fills.

    Args:
        values: the states' tensors, one parameter after the other.
        records: of the same parameters, in the same order.
    Returns:
        Lists by `Record.replica`, each in the given order.
    """
    # The states come as one list because torch.compile takes tensors over from flat lists only.
    members: dict[int, list[Member]] = {}
    start = 0
    for p, g, (name, replica, keys) in zip(params, grads, records, strict=True):
        state = dict(zip(keys, values[start : start + len(keys)], strict=True))
        start += len(keys)
        members.setdefault(replica, []).append(make_member(name, p, g, state))
    return members


def is_readable(x: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at without waiting for a device, and without breaking a traced graph.

    Where they can, decisions are made on the host and cost nothing later; else masks and tensors carry them.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device is recorded in a CUDA graph instead."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def read_number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """A group's option as it is now: a number where it can be had without waiting for a device.

    Returns:
        The number, or a tensor `[]` on `device`.
    """
    if not isinstance(value, Tensor):
        return float(value)
    return float(value) if is_readable(value) else value.detach().reshape(()).to(device)


def make_column(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor `[n]` on a device, which is not waited for."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    # A CUDA graph must hold the numbers: a copy would be made again in every replay, of memory that is gone.
    if is_capturing(device):
        runs = [(value, len(list(run))) for value, run in groupby(numbers)]
        return torch.cat([torch.full((count,), value, dtype=dtype, device=device) for value, count in runs])
    return upload(numbers, dtype, device)


def mirror_loss(loss: Tensor | None, units: Sequence[Unit]) -> Tensor | None:
    """The loss as a rule is told it: negated for parameters that ascend, as these descend on the negative of it.

    Args:
        loss: `[]` or None.
    Returns:
        `[1]`, or `[n]` of the members of all units where some ascend and some descend.
    """
    if loss is None:
        return None
    ascends = [bool(unit.groups[0]["maximize"]) for unit in units for _ in unit.members]
    if len(set(ascends)) == 1:  # the usual case, with fewer operations
        return (-loss if ascends[0] else loss).reshape(1)
    return torch.stack([-loss if ascend else loss for ascend in ascends])


def add_up(x: Tensor, shard: Shard | None) -> Tensor:
    """The sum of `x` over the processes that share a parameter, all of which have to call this.

    Args:
        shard: of the parameter; None where it is whole, and `x` itself is the sum.
    """
    if shard is None:
        return x
    total: Tensor = import_sharding().add_up([x], [shard])[0]
    return total


def is_sharded(p: Any) -> bool:
    """Whether it is a DTensor; asked so that torch.distributed.tensor need not be imported."""
    return hasattr(p, "placements")


def import_sharding() -> Any:
    """The module `lopt.optim.sharding`, whose import takes a second; where there are DTensors, most of it is paid."""
    import lopt.optim.sharding

    return lopt.optim.sharding
