"""Where a run ends: the plan that each group follows, what rules are told of it, and how an open run is given an end.

A plan is `num_steps` among a group's options: given by the user, or made by `cool_groups` when the end becomes known.
Then the option `cool_down` is there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.core.foreign_text import make_printable
from lopt.optim.options import ADAMW
from lopt.optim.units import STEP, Unit, make_column
from lopt.rules import Clock, Rule

Group = Mapping[str, Any]


class Plan(NamedTuple):
    """What a group follows; groups of equal plans belong to one run. See `Clock` for the numbers.

    Attributes:
        num_steps: the run's steps at its end; 0: no end is known.
        cool_start: the run's steps when the end became known.
        cool_span: steps of the whole half cosine of which the run follows the last part.
    """

    num_steps: int
    cool_start: int
    cool_span: float


def read_plan(group: Group) -> Plan:
    """The plan of a group, by its options as they are now."""
    num_steps = group["num_steps"] or 0
    start, span = group["cool_down"] or (0, num_steps)
    return Plan(num_steps, start, span)


def find_end(groups: Iterable[Group]) -> int | None:
    """The steps that are planned for the whole training: those of the longest plan among the rule's own groups.

    Args:
        groups: an optimizer's `param_groups`.
    Returns:
        The guard's plan, which hears one loss for all groups; None if none of them has one.
    """
    plans = [group["num_steps"] for group in groups if group["rule"] != ADAMW and group["num_steps"] is not None]
    return max(plans, default=None)


def read_steps(states: Iterable[Mapping[str, Any]]) -> int:
    """The most updates that a parameter has had, which is how far a run is; waits for the device.

    A parameter that had no gradient at times, or one that was not finite, has had less.
    """
    return max((int(state[STEP]) for state in states if STEP in state), default=0)


# -- the end of an open run --------------------------------------------------------------------------------------------


def cool_groups(
    groups: Iterable[dict[str, Any]], states: Mapping[Tensor, Mapping[str, Any]], rule: Rule, num_steps: int
) -> None:
    """Give the groups that are open, or cool down already, an end in `num_steps` steps; see `LearnedOptimizer`.

    Args:
        groups: an optimizer's `param_groups`.
        states: of its parameters, whose counters are waited for.
        rule: the optimizer's.
    Raises:
        ValueError: see `LearnedOptimizer.cool_down`; nothing has changed.
    """
    if not (isinstance(num_steps, Integral) and num_steps >= 1):
        raise ValueError(f"cool_down takes a whole number of steps, at least 1, got {make_printable(repr(num_steps))}")
    if not rule.has_schedule:
        raise ValueError(
            f"rule {rule.name!r} has no schedule that could be cooled down: lower lr, as by a scheduler of "
            "torch.optim.lr_scheduler"
        )
    own = [group for group in groups if group["rule"] != ADAMW]
    cooled = [group for group in own if group["num_steps"] is None or group["cool_down"] is not None]
    if not cooled:
        plans = ", ".join(str(group["num_steps"]) for group in own) or "no groups"
        raise ValueError(
            f"there is nothing to cool down: the groups of rule {rule.name!r} have plans already (num_steps: {plans}). "
            "Construct the optimizer without num_steps where the end is not known at first."
        )
    # Groups of one plan are in one run, whose farthest parameter tells how far it is (`find_run_steps`).
    plans = [read_plan(group) for group in cooled]
    ends = {}
    for plan in dict.fromkeys(plans):
        followers = (p for group, other in zip(cooled, plans, strict=True) if other == plan for p in group["params"])
        ends[plan] = _end_plan(plan, read_steps(states[p] for p in followers if p in states), int(num_steps))
    for group, plan in zip(cooled, plans, strict=True):
        end = ends[plan]
        group.update(num_steps=end.num_steps, cool_down=(end.cool_start, end.cool_span))


def _end_plan(plan: Plan, now: int, num_steps: int) -> Plan:
    """The plan of a run that has made `now` steps and is to make so many more."""
    if plan.num_steps == 0:
        return Plan(now + num_steps, now, num_steps)
    left = plan.num_steps - now
    if left <= 0:
        raise ValueError(
            f"the run has ended at step {plan.num_steps}: its steps have no size from which they could be cooled down"
        )
    # What is left of the cosine is stretched or shortened, so that the size goes on from where it is.
    return Plan(now + num_steps, plan.cool_start, plan.cool_span * num_steps / left)


# -- what rules are told -----------------------------------------------------------------------------------------------


def list_plans(units: Sequence[Unit]) -> list[Plan]:
    """The plan of every member, in order."""
    plans: list[Plan] = []
    for unit in units:
        own = [read_plan(group) for group in unit.groups]
        plans += own * len(unit.members) if len(own) == 1 else own
    return plans


def read_clock(steps: Tensor, plans: Sequence[Plan]) -> Clock:
    """What rules with a schedule are told of the run, as tensors and without waiting for a device.

    Args:
        steps: updates of n parameters, int64 `[n]`.
        plans: of each of them.
    Returns:
        A clock of tensors `[n]`.
    """
    distinct, places = number_plans(plans)
    cooled = any(plan.cool_start for plan in distinct) or any(plan.cool_span != plan.num_steps for plan in distinct)
    if len(distinct) == 1:  # the usual case, with fewer operations
        num_steps, start, span = distinct[0]
        clock = Clock(steps, torch.full_like(steps, num_steps), find_run_steps(steps))
        if not cooled:
            return clock
        spans = torch.full_like(steps, span, dtype=torch.float32)
        return clock._replace(cool_start=torch.full_like(steps, start), cool_span=spans)
    count, starts = len(distinct), [plan.cool_start for plan in distinct] if cooled else []
    column = make_column([*places, *(plan.num_steps for plan in distinct), *starts], torch.int64, steps.device)
    on_device, ends = column[: len(places)], column[len(places) :]
    clock = Clock(steps, ends[:count][on_device], find_run_steps(steps, on_device, count))
    if not cooled:
        return clock
    spans = make_column([plan.cool_span for plan in distinct], torch.float32, steps.device)
    return clock._replace(cool_start=ends[count:][on_device], cool_span=spans[on_device])


def number_plans(plans: Sequence[Plan]) -> tuple[list[Plan], list[int]]:
    """The different plans of n parameters, and for each parameter which of them is its own."""
    distinct = list(dict.fromkeys(plans))
    numbers = {plan: number for number, plan in enumerate(distinct)}
    return distinct, [numbers[plan] for plan in plans]


def find_run_steps(steps: Tensor, places: Tensor | None = None, count: int = 1) -> Tensor:
    """The run's steps so far, int64 `[n]`.

    A tensor that had no gradient at times is as far in the run as the others of the same plan.

    Args:
        steps: updates made, int64 `[n]`.
        places: which of `count` plans each parameter follows, int64 `[n]`; None: there is one for all.
    """
    if places is None:
        return steps.amax().expand_as(steps)
    latest = steps.new_zeros(count).scatter_reduce(0, places, steps, "amax")
    return latest[places]
