"""One step of many parameters under one rule: divides them into units, and runs the rule's stages on these.

The host waits for no device: what it cannot know, such as which gradients are finite, stays in masks on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lopt_kernels.launching.parameters import BOUND
from torch import Tensor

from lopt.core.random import fold_in
from lopt.optim.group_adamw import GroupAdamW, give_numbers
from lopt.optim.plans import list_plans, read_clock
from lopt.optim.torch_backend.chunked import ChunkedTensor, chunk_length
from lopt.optim.torch_backend.stacked import StackedTensors
from lopt.optim.units import (
    SEED,
    STEP,
    Member,
    Scaled,
    Unit,
    import_sharding,
    is_readable,
    mirror_loss,
)
from lopt.optim.update import ParameterUpdate, Transform
from lopt.rules import Clock, Rule, step_tensors
from lopt.rules.stages import Steppable, divide_sums


class Live(NamedTuple):
    """Which parameters a step moves: those whose gradients are finite; how many others, or very large ones, there are.

    Attributes:
        units: what is stepped; members that are known to be left out are not among them.
        mask: bool `[n]` of the members of all `units`, where only the device knows; None: all of them are live.
        limit: there may be entries of gradients beyond `BOUND`.
        skipped: how many parameters are left out, a number or int64 `[]` on their device.
        limited: how many of the others have entries beyond `BOUND`, likewise.
    """

    units: Sequence[Unit]
    mask: Tensor | None
    limit: bool = False
    skipped: Tensor | int = 0
    limited: Tensor | int = 0


class _Flags(NamedTuple):
    """Of n gradients, bool `[n]` each.

    Attributes:
        finite: all entries are.
        large: likewise, and some are beyond `BOUND` once they are unscaled.
    """

    finite: Tensor
    large: Tensor


def make_units(rule: Rule, units: Iterable[Unit]) -> Iterator[Unit]:
    """Divide the members of groups into units: equal small tensors together, as many as make a chunk.

    Groups that differ in numbers only do not come between them.

    Args:
        rule: that steps them; its temporaries count in the size of a chunk.
        units: one for each group. With `foreach` False every member is a unit, and so are always parts of DTensors.
    """
    compiling = torch.compiler.is_compiling()  # the compiler fuses: no chunks
    # Tensors can be stacked if shapes and dtypes agree; parts of DTensors have places of their own in the whole.
    alike: dict[tuple[object, ...], tuple[list[Member], list[Mapping[str, Any]]]] = {}
    for members, (group,) in units:
        apart, maximize = group["foreach"] is False and not compiling, bool(group["maximize"])
        for member in members:
            if apart or member.shard is not None:
                yield Unit([member], [group])
                continue
            key = (member.p.shape, member.p.dtype, member.g.dtype, maximize)
            if key not in alike:
                alike[key] = [], []
            alike[key][0].append(member)
            alike[key][1].append(group)
    # A stack is copied in every stage: it must not outgrow the cache, or the memory that chunks are bounded to.
    for equal, groups in alike.values():
        first, size = equal[0], len(equal)
        if not compiling:
            size = chunk_length(first.p, first.pick_accumulators(), rule.temporaries) // max(1, first.p.numel())
        size = max(1, size)
        one_group = all(group is groups[0] for group in groups)
        for start in range(0, len(equal), size):
            yield Unit(equal[start : start + size], groups[:1] if one_group else groups[start : start + size])


def step_units(
    rule: Rule,
    units: Sequence[Unit],
    loss: Tensor | None,
    sanitize: bool,
    transforms: Callable[[Unit, Tensor], Transform | None],
    decay_scale: Callable[[Unit], float],
    amp: Scaled | None = None,
) -> tuple[Tensor | int, Tensor | int]:
    """One step of all units under one rule, in place: parameters, accumulators and counters.

    Args:
        units: on one device, as `make_units` divides them.
        loss: `[]` or None.
        sanitize: NaN and infinite entries of gradients count as 0; otherwise such gradients are skipped.
        transforms: makes `ParameterUpdate.transform` for a unit, given its updates so far, int64 `[]` or `[k]`.
        decay_scale: factor on a unit's weight decay.
        amp: what a gradient scaler says of the gradients: whether they are finite is not asked again then.
    Returns:
        How many parameters were skipped for gradients that are not finite, and how many gradients were limited.
    """
    # Which gradients count comes first: it decides what the rule sees of all tensors together.
    live = find_live(units, sanitize, amp)
    if not live.units:
        return live.skipped, live.limited
    counters = [member.state[STEP] for unit in live.units for member in unit.members]
    steps = torch.stack(counters)
    # Options are read now, as schedulers may have changed them since the last step.
    unscale = None if amp is None else amp.unscale
    tensors: list[Steppable] = []
    for unit, place in _find_places(live.units):
        update = ParameterUpdate(
            lr=unit.read_number("lr"),
            decay=unit.read_number("weight_decay") * decay_scale(unit),
            maximize=unit.groups[0]["maximize"],
            unscale=unscale,
            sanitize=sanitize,
            limit=live.limit,
            live=None if live.mask is None else live.mask[place],
            seeds=_make_seeds(unit, steps[place]),
            transform=transforms(unit, steps[place]),
        )
        tensors.append(make_steppable(rule, unit, update))
        if isinstance(rule, GroupAdamW):
            give_numbers(unit, tensors[-1])
    # The rule sees the counters from before the step; they advance after it, where the step was made.
    clock = read_clock(steps, list_plans(live.units)) if rule.has_schedule else Clock(steps, None)
    sharded = any(unit.members[0].shard is not None for unit in live.units)
    loss = mirror_loss(loss, live.units)
    step_tensors(rule, tensors, loss, clock, import_sharding().to_means if sharded else divide_sums)
    advance_counters(counters, steps, live.mask)
    return live.skipped, live.limited


def find_live(units: Sequence[Unit], sanitize: bool, amp: Scaled | None) -> Live:
    """Which parameters a step moves, found without waiting for a device.

    Where the host may look, the others are dropped as if they had no gradient; elsewhere they get a mask.

    Args:
        sanitize: all are live, as entries that are not finite will count as 0.
        amp: a gradient scaler that has looked at all gradients together: all are live or none.
    """
    flags = _find_flags(units, sanitize, None if amp is None else amp.unscale)
    if amp is not None:
        mask = (amp.found_inf == 0).reshape(()).expand(sum(len(unit.members) for unit in units))
        limited = 0 if flags is None else (mask & flags.large).sum()
        return Live(units, mask, flags is not None, (~mask).sum(), limited)
    if flags is None:
        return Live(units, None)
    if sanitize:
        return Live(units, None, True, 0, flags.large.sum())
    if not is_readable(flags.finite):
        return Live(units, flags.finite, True, (~flags.finite).sum(), flags.large.sum())
    finite = flags.finite.tolist()
    return Live(_keep_live(units, finite), None, True, len(finite) - sum(finite), flags.large.sum())


def make_steppable(rule: Rule, unit: Unit, update: ParameterUpdate) -> Steppable:
    """The tensors of a unit as the stages of a rule walk through them: stacked, or alone and in chunks.

    Args:
        update: what the options make of a step; with a transform, the guard's tensors go along.
    """
    accs = [member.pick_accumulators() for member in unit.members]
    guards = [member.pick_guards() for member in unit.members] if update.transform is not None else []
    if unit.is_stacked():
        params, grads = [member.p for member in unit.members], [member.g for member in unit.members]
        return StackedTensors(params, grads, accs, update, rule.tensor_keys, guards)
    member = unit.members[0]
    return ChunkedTensor(rule, member.p, member.g, accs[0], update, guards[0] if guards else {}, member.shard)


def advance_counters(counters: list[Tensor], steps: Tensor, mask: Tensor | None) -> None:
    """Count the step in the state of the parameters that made it, in place.

    Args:
        counters: int64 `[]` each, n in all.
        steps: their values before the step, `[n]`.
        mask: see `Live`.
    """
    if mask is None:
        torch._foreach_add_(counters, 1)
    else:
        torch._foreach_copy_(counters, list((steps + mask).unbind(0)))


def check_finite(units: Iterable[Unit]) -> None:
    """Look at all gradients before anything is changed, for users who want an error; waits for every device once.

    Args:
        units: of any rules and devices; where there are DTensors, all processes have to call this.
    Raises:
        RuntimeError: a gradient is not finite; the message names a parameter.
    """
    by_device: dict[torch.device, list[Unit]] = {}
    for unit in units:
        by_device.setdefault(unit.members[0].p.device, []).append(unit)
    for alike in by_device.values():
        flags = _find_flags(alike, sanitize=False)
        if flags is None or bool(flags.finite.all()):
            continue
        members = [member for unit in alike for member in unit.members]
        names = [member.name or f"of shape {list(member.p.shape)}" for member in members]
        bad = [name for name, fine in zip(names, flags.finite.tolist(), strict=True) if not fine]
        raise RuntimeError(
            f"the gradient of {len(bad)} parameters has NaN or infinite entries, the first is {bad[0]}; "
            "nothing was changed (nonfinite='raise')"
        )


def _find_places(units: Sequence[Unit]) -> Iterator[tuple[Unit, slice | int]]:
    """Every unit with where its members are among all: a slice if they have a dimension of their own, or an index."""
    start = 0
    for unit in units:
        yield unit, slice(start, start + len(unit.members)) if unit.is_stacked() else start
        start += len(unit.members)


def _find_flags(units: Sequence[Unit], sanitize: bool, unscale: Tensor | None = None) -> _Flags | None:
    """What is to be known of all gradients on all processes; None where all are known to be finite and within bounds.

    Args:
        sanitize, unscale: of `ParameterUpdate`.
    """
    largest = torch.cat([_find_largest(unit, sanitize) for unit in units])
    beyond = ~((largest if unscale is None else largest * unscale) <= BOUND)  # of NaN, too
    shards = [member.shard for unit in units for member in unit.members]
    sharded = any(shards)
    # The usual case is known by one number; where there are shards, all processes have to hear of it.
    if not sharded and is_readable(beyond) and not bool(beyond.any()):
        return None
    finite = largest.isfinite()
    if sharded:  # a process may not skip a parameter of which another one sees only finite gradients
        counts = torch.stack([~finite, beyond], -1).float()
        found = torch.stack(import_sharding().add_up(list(counts.unbind(0)), shards)) > 0
        finite, beyond = ~found[:, 0], found[:, 1]
        if is_readable(beyond) and not bool(beyond.any()):
            return None
    return _Flags(finite, finite & beyond)


def _find_largest(unit: Unit, sanitize: bool) -> Tensor:
    """The size of the largest entry of each gradient, `[k]`, at least fp32: what is finite in fp64 stays so.

    A maximum needs no temporary memory of the gradient's size, unless entries that are not finite count as 0.
    """
    count, first = len(unit.members), unit.members[0].g
    if first.numel() == 0:
        return torch.zeros(count, dtype=torch.float32, device=first.device)
    g = torch.stack([member.g for member in unit.members]).view(count, -1) if unit.is_stacked() else first
    if sanitize:
        g = g.nan_to_num(0.0, 0.0, 0.0)
    largest: Tensor = torch.linalg.vector_norm(g, float("inf"), dim=1 if unit.is_stacked() else None).reshape(count)
    return largest.to(torch.promote_types(largest.dtype, torch.float32))


def _keep_live(units: Sequence[Unit], flags: Sequence[bool]) -> list[Unit]:
    """The units without the members whose flags are False, as if these had no gradient."""
    kept = []
    start = 0
    for unit in units:
        indices = [i for i in range(len(unit.members)) if flags[start + i]]
        start += len(unit.members)
        if indices:
            kept.append(unit.pick(indices))
    return kept


def _make_seeds(unit: Unit, steps: Tensor) -> Tensor | None:
    """Seeds of this step's stochastic rounding, if it is on; those of shards differ."""
    if SEED not in unit.members[0].state:
        return None
    # Every step and every shard needs bits of its own, reproducibly: both are folded into the parameter's seed.
    seeds = [member.state[SEED] for member in unit.members]
    now = fold_in(torch.stack(seeds) if unit.is_stacked() else seeds[0], steps)
    shard = unit.members[0].shard
    return now if shard is None else fold_in(now, sum(shard.offset))
