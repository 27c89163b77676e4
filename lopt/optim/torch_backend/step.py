"""One step of many parameters under one rule: divides them into units, and runs the rule's stages on these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lopt.core.random import fold_in
from lopt.optim.guard.decisions import init_guard
from lopt.optim.torch_backend.chunked import ChunkedTensor, chunk_length
from lopt.optim.torch_backend.stacked import Bucket
from lopt.optim.update import Apply, Transform
from lopt.rules import Clock, Rule, find_layout, step_tensors
from lopt.rules.stages import Steppable, divide_sums

if TYPE_CHECKING:
    from lopt.optim.sharding import Shard

STEP, SEED = "step", "seed"  # what a parameter's state holds beside the rule's accumulators
GUARD = "guard_"  # the beginning of the names of what the guard keeps there
NOT_THE_RULES = (STEP, SEED, GUARD)


class Member(NamedTuple):
    """A parameter that is to be stepped: its tensors are this process's part, `shard` tells of what."""

    name: str
    p: Tensor
    g: Tensor
    state: dict[str, Tensor]
    shard: Shard | None

    def pick(self, extra: bool) -> dict[str, Tensor]:
        """The rule's accumulators, or (extra) those of the guard."""
        prefix = GUARD if extra else NOT_THE_RULES
        return {key: value for key, value in self.state.items() if key.startswith(prefix) == extra}


class Unit(NamedTuple):
    """Parameters that are stepped as one: k equal ones, or a single one."""

    members: Sequence[Member]
    group: Mapping[str, Any]

    @property
    def together(self) -> bool:
        """Whether there is a dimension for the members."""
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
    """A member; of DTensors this process's part."""
    if not _is_sharded(p):
        return Member(name, p, g, state, None)
    sharding = _sharding()
    local = {key: sharding.to_local(value) for key, value in state.items()}
    return Member(name, sharding.to_local(p), sharding.to_local(g, like=p), local, sharding.Shard(p))


def init_state(
    rule: Rule, p: Tensor, seed: int | None, guarded: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A parameter's state before its first step.

    Args:
        dtype: of the rule's `compact_keys`; all else is in fp32.
        seed: of its stochastic rounding, if it is rounded so.
        guarded: with what the guard keeps.
    Returns:
        The int64 counter "step" `[]`, "seed" likewise, the rule's accumulators, and tensors named "guard_*".
    """
    state = {STEP: torch.zeros((), dtype=torch.int64, device=p.device)}
    if seed is not None:
        state[SEED] = torch.full((), seed, dtype=torch.int64, device=p.device)
    layout = find_layout(tuple(p.shape))
    if _is_sharded(p):
        init = _sharding().init_parts
        state |= init(lambda part, x: rule.init_accumulators(part.float(), x), p, rule.tensor_keys, rule.line_keys)
        state |= init(lambda part, x: init_guard(part), p, (), ()) if guarded else {}
    else:
        state |= rule.init_state({"": p.float()}).accumulators[""]
        state |= init_guard(p.reshape(layout.shape)) if guarded else {}
    return state | {key: state[key].to(dtype) for key in rule.compact_keys}


def make_units(rule: Rule, members: Iterable[Member], group: Mapping[str, Any]) -> Iterator[Unit]:
    """Divide the members of a group into units: equal small tensors together, as many as make a chunk."""
    compiling = torch.compiler.is_compiling()  # the compiler fuses: no chunks
    alike: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        if member.shard is not None or (group["foreach"] is False and not compiling):
            yield Unit([member], group)
        else:
            alike.setdefault((member.p.shape, member.p.dtype, member.g.dtype), []).append(member)
    for equal in alike.values():
        first, size = equal[0], len(equal)
        if not compiling:
            size = chunk_length(first.p, first.pick(extra=False), rule.temporaries) // max(1, first.p.numel())
        for start in range(0, len(equal), max(1, size)):
            yield Unit(equal[start : start + max(1, size)], group)


def step_units(
    rule: Rule,
    units: Sequence[Unit],
    loss: Tensor | None,
    sanitize: bool,
    transforms: Callable[[Unit, Tensor], Transform | None],
    decay_scale: Callable[[Unit], float],
    amp: Scaled | None = None,
) -> Tensor | int:
    """One step of all units, in place.

    Args:
        loss: `[]` or None.
        sanitize: NaN and infinite entries of gradients count as 0; otherwise such gradients are skipped.
        transforms: makes `Apply.transform` for a unit, given its updates so far, int64 `[]` or `[k]`.
        decay_scale: factor on a unit's weight decay.
        amp: what a gradient scaler says of the gradients, which then are not looked at here.
    Returns:
        How many parameters were skipped for gradients that are not finite.
    """
    if amp is not None:
        live: Tensor | None = (amp.found_inf == 0).reshape(()).expand(sum(len(unit.members) for unit in units))
    else:
        live = None if sanitize else _find_live(units)
    skipped: Tensor | int = 0
    if amp is None and live is not None and _is_known(live):
        flags = live.tolist()
        units, skipped, live = _keep_live(units, flags), len(flags) - sum(flags), None
        if not units:
            return skipped
    counters = [member.state[STEP] for unit in units for member in unit.members]
    steps = torch.stack(counters)
    tensors: list[Steppable] = []
    start = 0
    for unit in units:
        place = slice(start, start + len(unit.members)) if unit.together else start
        start += len(unit.members)
        apply = Apply(
            lr=read_lr(unit.group["lr"], steps.device),
            decay=float(unit.group["weight_decay"]) * decay_scale(unit),
            maximize=unit.group["maximize"],
            unscale=None if amp is None else amp.unscale,
            sanitize=sanitize,
            live=None if live is None else live[place],
            seeds=_make_seeds(unit, steps[place]),
            transform=transforms(unit, steps[place]),
        )
        tensors.append(_make_tensor(rule, unit, apply))
    clock = Clock(steps, None)
    if rule.needs_num_steps:
        plans = [unit.group["num_steps"] for unit in units for _ in unit.members]
        clock = Clock(steps, *read_plans(steps, plans))
    sharded = any(unit.members[0].shard is not None for unit in units)
    step_tensors(rule, tensors, loss, clock, _sharding().to_means if sharded else divide_sums)
    if live is None:
        torch._foreach_add_(counters, 1)
        return skipped
    torch._foreach_copy_(counters, list((steps + live).unbind(0)))
    return (~live).sum()


def check_finite(units: Sequence[Unit]) -> None:
    """Raise RuntimeError, naming a parameter, if a gradient is not finite; waits for the device."""
    live = _find_live(units) if units else None
    if live is None or bool(live.all()):
        return
    members = [member for unit in units for member in unit.members]
    names = [member.name or f"of shape {list(member.p.shape)}" for member in members]
    bad = [name for name, fine in zip(names, live.tolist(), strict=True) if not fine]
    raise RuntimeError(
        f"the gradient of {len(bad)} parameters has NaN or infinite entries, the first is {bad[0]}; "
        "nothing was changed (nonfinite='raise')"
    )


def _make_tensor(rule: Rule, unit: Unit, apply: Apply) -> Steppable:
    accs = [member.pick(extra=False) for member in unit.members]
    extras = [member.pick(extra=True) for member in unit.members] if apply.transform is not None else []
    if unit.together:
        params, grads = [member.p for member in unit.members], [member.g for member in unit.members]
        return Bucket(params, grads, accs, apply, rule.tensor_keys, extras)
    member = unit.members[0]
    return ChunkedTensor(rule, member.p, member.g, accs[0], apply, extras[0] if extras else {}, member.shard)


def _find_live(units: Sequence[Unit]) -> Tensor | None:
    """Which gradients are finite on all processes, bool `[n]`; None where all are known to be."""
    finite = torch.cat([_are_finite(unit) for unit in units])
    shards = [member.shard for unit in units for member in unit.members]
    if any(shards):
        bad = list((~finite).float().unbind(0))
        finite = torch.stack(_sharding().add_up(bad, shards)) == 0
    return None if _is_known(finite) and bool(finite.all()) else finite


def _is_known(x: Tensor) -> bool:
    """Whether a tensor can be looked at without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _keep_live(units: Sequence[Unit], flags: Sequence[bool]) -> list[Unit]:
    """The units without the members whose flags are False, as if these had no gradient."""
    kept = []
    start = 0
    for unit in units:
        indices = [i for i in range(len(unit.members)) if flags[start + i]]
        start += len(unit.members)
        if indices:
            kept.append(unit._replace(members=[unit.members[i] for i in indices]))
    return kept


def _are_finite(unit: Unit) -> Tensor:
    """Bool `[k]`; a maximum needs no temporary memory of the gradient's size."""
    grads = [member.g for member in unit.members]
    if grads[0].numel() == 0:
        return torch.ones(len(grads), dtype=torch.bool, device=grads[0].device)
    if unit.together:
        largest: Tensor = torch.linalg.vector_norm(torch.stack(grads).view(len(grads), -1), float("inf"), dim=1)
    else:
        largest = torch.linalg.vector_norm(grads[0], float("inf")).reshape(1)
    return largest.isfinite()


def read_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A number where it can be had without waiting for a device, else a tensor of no dimension."""
    if not isinstance(lr, Tensor):
        return float(lr)
    if lr.device.type == "cpu" and not torch.compiler.is_compiling():
        return float(lr)
    return lr.detach().reshape(()).to(device)


def _make_seeds(unit: Unit, steps: Tensor) -> Tensor | None:
    """Seeds of this step's stochastic rounding, if it is on."""
    if SEED not in unit.members[0].state:
        return None
    seeds = [member.state[SEED] for member in unit.members]
    now = fold_in(torch.stack(seeds) if unit.together else seeds[0], steps)
    shard = unit.members[0].shard
    return now if shard is None else fold_in(now, sum(shard.offset))


def read_plans(steps: Tensor, plans: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Planned steps and the run's steps so far, int64 `[n]`."""
    if len(set(plans)) == 1:
        return torch.full_like(steps, plans[0]), find_run_steps(steps, steps, alike=True)
    totals = torch.cat([steps.new_full((1,), plan) for plan in plans])
    return totals, find_run_steps(steps, totals, alike=False)


def find_run_steps(steps: Tensor, totals: Tensor, alike: bool) -> Tensor:
    """The run's steps so far, int64 `[n]`.

    A tensor that had no gradient at times is as far in the run as the others with the same plan.
    """
    return steps.amax().expand_as(steps) if alike else ((totals[:, None] == totals) * steps).amax(-1)


def add_up(x: Tensor, shard: Shard | None) -> Tensor:
    """The sum over the processes that share a tensor."""
    if shard is None:
        return x
    total: Tensor = _sharding().add_up([x], [shard])[0]
    return total


def _is_sharded(p: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(p, "placements")


def _sharding() -> Any:
    """The module, whose import takes a second; there are DTensors, so most of it is paid already."""
    import lopt.optim.sharding

    return lopt.optim.sharding
