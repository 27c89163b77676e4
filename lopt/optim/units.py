"""What both backends step: the parameters of an optimizer that have a gradient, with their state and options.

A member is one parameter, a unit are members with one group's options. Here is also what both backends read in the same
way: learning rates, planned steps, and what a gradient scaler has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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
    """Parameters that are stepped under one group's options: k equal ones as one tensor, or a single one.

    Attributes:
        members: at least one; of one shape, dtypes and device where they are stepped together.
        group: of the optimizer's `param_groups`; its options are read at every step.
    """

    members: Sequence[Member]
    group: Mapping[str, Any]

    @property
    def together(self) -> bool:
        """Whether its tensors have a dimension for the members; the compiler, which fuses, sees one in every unit."""
        return len(self.members) > 1 or torch.compiler.is_compiling()


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


def read_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A group's learning rate as it is now: a number where it can be had without waiting for a device.

    Returns:
        The number, or a tensor `[]` on `device`.
    """
    if not isinstance(lr, Tensor):
        return float(lr)
    return float(lr) if is_readable(lr) else lr.detach().reshape(()).to(device)


def mirror_loss(loss: Tensor | None, units: Sequence[Unit]) -> Tensor | None:
    """The loss as a rule is told it: negated for parameters that ascend, as these descend on the negative of it.

    Args:
        loss: `[]` or None.
    Returns:
        `[1]`, or `[n]` of the members of all units where some ascend and some descend.
    """
    if loss is None:
        return None
    ascends = [bool(unit.group["maximize"]) for unit in units for _ in unit.members]
    if len(set(ascends)) == 1:  # the usual case, with fewer operations
        return (-loss if ascends[0] else loss).reshape(1)
    return torch.stack([-loss if ascend else loss for ascend in ascends])


def list_num_steps(units: Sequence[Unit]) -> list[int]:
    """The planned steps of every member, in order.

    For rules with a schedule, whose groups all have the option `num_steps` (`check_num_steps`); those of AdamW may not.
    """
    return [unit.group["num_steps"] for unit in units for _ in unit.members]


def read_num_steps(steps: Tensor, num_steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What rules with a schedule are told of the run, as tensors and without waiting for a device.

    Args:
        steps: updates of n parameters, int64 `[n]`.
        num_steps: planned for each of them.
    Returns:
        Planned steps and the run's steps so far, int64 `[n]` each.
    """
    if len(set(num_steps)) == 1:  # the usual case, with fewer operations
        return torch.full_like(steps, num_steps[0]), find_run_steps(steps, steps, alike=True)
    totals = torch.cat([steps.new_full((1,), number) for number in num_steps])
    return totals, find_run_steps(steps, totals, alike=False)


def find_run_steps(steps: Tensor, totals: Tensor, alike: bool) -> Tensor:
    """The run's steps so far, int64 `[n]`.

    A tensor that had no gradient at times is as far in the run as the others with as many planned steps.

    Args:
        steps, totals: updates made and planned, int64 `[n]`.
        alike: all have the same total; then `totals` is not looked at.
    """
    return steps.amax().expand_as(steps) if alike else ((totals[:, None] == totals) * steps).amax(-1)


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
