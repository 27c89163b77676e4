"""The guard on tensors: what becomes of a rule's step, and the snapshot that a failed turn is undone with.

Works on one parameter, or on k equal ones at once, and waits for no device. Costs 12 bytes per parameter: AdamW's two
moments, which are kept warm, and a snapshot, because a parameter that a broken rule has thrown far away is not a place
from which AdamW recovers in time. Who steps is decided in `lopt.optim.guard.decisions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopt.optim.guard.decisions import Guard, GuardOptions
from lopt.optim.options import ADAMW, find_direction
from lopt.optim.plans import find_end
from lopt.optim.units import STEP, Unit, add_up, make_member
from lopt.optim.update import Transform
from lopt.rules import Rule

Accumulators = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]

GUARD_START = "guard_start"  # the step from which AdamW's moments count
GUARD_SQUARES = ("guard_v", "guard_norm")  # never below 0
NORM_DECAY = 0.95
NORM_GROWTH = 2.0


def init_guard(p: Tensor, batch_ndim: int = 0) -> Accumulators:
    """The guard's state before the first step of a parameter `[*shape]`, or of k equal ones, `[k, *shape]`.

    Args:
        batch_ndim: 1 if the first dimension counts parameters.
    Returns:
        "guard_m", "guard_v" (AdamW's moments) fp32 and "guard_p" (the snapshot) in at least fp32, like `p`;
        "guard_norm" (the running norm of the steps; 0: not yet) fp32 and "guard_start" (the step from which the moments
        count) int64, `[]` or `[k]`.
    """
    batch = p.shape[:batch_ndim]
    m = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
    return {
        "guard_m": m,
        "guard_v": torch.zeros_like(m),
        "guard_p": p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True).contiguous(),
        "guard_norm": torch.zeros(batch, dtype=torch.float32, device=p.device),
        GUARD_START: torch.zeros(batch, dtype=torch.int64, device=p.device),
    }


def make_transform(
    guard: Guard | None, unit: Unit, steps: Tensor, lr_adamw: float, clipped: Tensor
) -> Transform | None:
    """What the guard makes of a unit's steps, for `ParameterUpdate`; None without a guard and in AdamW's own groups.

    Args:
        steps: updates made so far, int64 `[]` or `[k]`.
        lr_adamw: see `guard_step`.
        clipped: int64 `[]`; grows by the parameters whose steps are shortened.
    """
    if guard is None or unit.groups[0]["rule"] == ADAMW:
        return None
    return partial(_guard_unit, guard=guard, unit=unit, steps=steps, lr_adamw=lr_adamw, clipped=clipped)


def _guard_unit(
    delta: Tensor,
    g: Tensor,
    state: Accumulators,
    in_place: bool,
    *,
    guard: Guard,
    unit: Unit,
    steps: Tensor,
    lr_adamw: float,
    clipped: Tensor,
) -> tuple[Tensor, Accumulators]:
    beta1, beta2, eps = unit.read_adamw()
    reduce = partial(add_up, shard=unit.members[0].shard)
    delta, state, count = guard_step(
        delta, g, state, steps, guard.share, lr_adamw, (beta1, beta2), eps, guard.options, reduce, in_place
    )
    clipped.add_(count)
    return delta, state


def scale_decay(guard: Guard | None, unit: Unit, rule: Rule, lr_adamw: float) -> float:
    """Factor on a unit's weight decay, which is meant per step of size one: the rule's, and under the guard AdamW's.

    Returns:
        `rule.decay_scale`, or that and AdamW's learning rate in the guard's shares.
    """
    if guard is None or unit.groups[0]["rule"] == ADAMW:
        return rule.decay_scale
    return guard.share * rule.decay_scale + (1 - guard.share) * lr_adamw


def guard_step(
    delta: Tensor,
    g: Tensor,
    state: Accumulators,
    step: Tensor,
    share: float | Tensor,
    lr_adamw: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    options: GuardOptions,
    reduce: Reduce | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Accumulators, Tensor]:
    """The step that is taken in place of `delta`: clipped, then mixed with AdamW's; without host synchronisation.

    Args:
        delta: the learned rule's step, without weight decay, fp32 `[*shape]` or `[k, *shape]`.
        g: gradient, like `delta`.
        state: from `init_guard` or the previous call.
        step: updates made so far, int64 `[]` or `[k]`.
        share: of the learned rule, see `Guard.share`; a number, or a tensor `[]` or `[k]`.
        lr_adamw: AdamW's learning rate, also the unit of `GuardOptions.seed_norm`.
        betas, eps: AdamW's; numbers, or tensors `[]` or `[k]`.
        reduce: sums a tensor over the shards of the parameter, where it is sharded.
        in_place: AdamW's moments and `delta` may be overwritten, which saves a third of the time; else it is pure.
    Returns:
        The step, the new state, and how many of the tensors were clipped or not finite, int64 `[]`.
    """
    axes = tuple(range(step.ndim, delta.ndim))
    wide = (*step.shape, *[1] * len(axes))
    beta1, beta2, eps = (x.view(wide) if isinstance(x, Tensor) and x.ndim else x for x in (*betas, eps))
    # The moments follow the gradients even where the rule steps alone, so that AdamW can take over at any step.
    m, v = state["guard_m"], state["guard_v"]
    m = m.lerp_(g, 1 - beta1) if in_place else torch.lerp(m, g, 1 - beta1)
    v = v.mul_(beta2) if in_place else v * beta2
    v = v + (1 - beta2) * g * g if isinstance(beta2, Tensor) else v.addcmul_(g, g, value=1 - beta2)

    clipped_step, new_norm, clipped = _clip(delta, state["guard_norm"], wide, lr_adamw, options, reduce, in_place)
    # With the rule alone, which is the usual case, AdamW's step is not even computed.
    if not (isinstance(share, float) and share == 1.0):
        age = (step - state[GUARD_START] + 1).view(wide)
        correction1, correction2 = 1 - beta1**age, (1 - beta2**age).sqrt()
        adamw_step = m / (v.sqrt() / correction2 + eps) * (-lr_adamw / correction1)
        weight = share.view(wide) if isinstance(share, Tensor) and share.ndim else share
        if isinstance(weight, Tensor):
            clipped_step = torch.lerp(adamw_step, clipped_step, weight)
        else:
            clipped_step = adamw_step + weight * (clipped_step - adamw_step)
    new = state | {"guard_m": m, "guard_v": v, "guard_norm": new_norm}
    return clipped_step, new, clipped.sum()


def _clip(
    delta: Tensor,
    norm_before: Tensor,
    wide: tuple[int, ...],
    lr_adamw: float | Tensor,
    options: GuardOptions,
    reduce: Reduce | None,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step, no longer than its running norm allows, the new running norm, and which steps were clipped.

    Args:
        norm_before: running norm, `[]` or `[k]`.
        wide: its shape, with dimensions of 1 up to those of `delta`.
    """
    axes = tuple(range(norm_before.ndim, delta.ndim))
    count = delta.numel() // max(1, norm_before.numel())
    squares = torch.linalg.vector_norm(delta, dim=axes).square() if axes else delta * delta
    sums = torch.stack([squares, torch.full_like(squares, count)])
    squares, count_all = reduce(sums) if reduce is not None else sums
    norm, unit = squares.sqrt(), lr_adamw * count_all.sqrt()
    # The running norm never falls below AdamW's step, so that a rule that has rested can move again, and grows by
    # NORM_GROWTH at most, so that one huge step does not open the way for the next.
    old = torch.where(norm_before > 0, torch.maximum(norm_before, unit), options.seed_norm * unit)
    limit = options.clip * old
    clipped = ~(norm <= limit)  # of NaN, too
    finite = torch.isfinite(norm)
    new_norm = NORM_DECAY * old + (1 - NORM_DECAY) * torch.where(finite, torch.minimum(norm, NORM_GROWTH * old), old)
    # A step with one entry that is not finite is dropped whole: what is left of it has no meaning.
    scale = torch.where(clipped, limit / norm.clamp(min=1e-38), 1.0)
    scaled = delta.mul_(scale.view(wide)) if in_place else delta * scale.view(wide)
    return torch.where(finite.view(wide), scaled, 0.0), new_norm, clipped


def hear_loss(
    guard: Guard, loss: Tensor | float | None, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Accumulators]
) -> bool:
    """Tell the guard the loss before a step, and save every parameter's snapshot, or put it back, as it decides.

    Args:
        loss: at the current parameters; a tensor is waited for. The guard hears the negative where groups ascend.
        groups: an optimizer's `param_groups`; all of them keep the guard's memory, of which loading reads the first.
        states: of the parameters; those without one have never moved. Of DTensors, every process moves its own part.
    Returns:
        Whether the parameters were put back: then no step is to be made.
    Raises:
        ValueError: some groups ascend and some descend; nothing has changed.
    """
    direction, guard.num_steps = find_direction(groups), find_end(groups)
    guard.observe(None if loss is None else direction * float(loss))
    memory = guard.now.to_numbers()
    for group in groups:
        group["guard_memory"] = memory
        for p in group["params"] if guard.save or guard.restore else ():
            if p not in states:
                continue
            member = make_member("", p, p, states[p])
            local = member.p.view(member.state["guard_p"].shape)
            if guard.restore:
                restore_snapshot(local, member.state, member.state[STEP])
            else:
                save_snapshot(local, member.state)
    return guard.restore


@torch.no_grad()
def save_snapshot(p: Tensor, state: Accumulators) -> None:
    """Keep the parameter as it is as the snapshot, in place.

    Args:
        p: `[*shape]`, or `[k, *shape]`.
        state: as `init_guard` makes it, whose snapshot is in at least fp32, so that nothing is lost.
    """
    state["guard_p"].copy_(p)


@torch.no_grad()
def restore_snapshot(p: Tensor, state: Accumulators, step: Tensor) -> None:
    """Put the snapshot back into the parameter and begin AdamW's moments anew, in place.

    Moments of gradients from where a broken rule has led would hold AdamW up for hundreds of steps.

    Args:
        p, state: as for `save_snapshot`.
        step: updates made so far, int64 `[]` or `[k]`, from which the moments' corrections count.
    """
    p.copy_(state["guard_p"])
    state["guard_m"].zero_()
    state["guard_v"].zero_()
    state[GUARD_START].copy_(step)
