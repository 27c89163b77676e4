"""Where tasks start if the rule learns it: the parameters before the first step, as functions of the meta-weights.

They are put into the slots at the start of a window, and not when a task is drawn: an estimator draws the next tasks
before the outer step, and those would begin with yesterday's weights, and without a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lopt.core.tensors import Params
from lopt.meta.unroll.imitation import start_teacher
from lopt.meta.unroll.rule_calls import view_params
from lopt.meta.unroll.slots import Slots
from lopt.rules import LearnedInit, Rule
from lopt.rules.learned_init import INIT
from lopt.tasks import TaskFamily

if TYPE_CHECKING:
    from lopt.meta.unroll.inner_loop import InnerLoop


def check_start(rule: Rule, family: TaskFamily) -> None:
    """Refuse an initialisation of other parameters than the family's.

    Raises:
        ValueError: another name, shape or order; the first is named.
    """
    if not isinstance(rule, LearnedInit):
        return
    rule.check_shapes(dict(zip(family.spec.names, family.spec.shapes, strict=True)))
    if tuple(rule.shapes) != family.spec.names:  # flat vectors go by it
        raise ValueError(
            f"the learned initialisation has the parameters in another order than {family.name!r}: "
            f"{list(rule.shapes)} and {list(family.spec.names)}. Give shapes in the family's order"
        )


def begin_tasks(loop: InnerLoop, slots: Slots, weights: Params | None) -> Slots:
    """The slots with those that have not made a step at the rule's initial parameters; the others as they are.

    Rules without such parameters, where tasks have their own, leave all as it is.

    Args:
        loop: whose rule says where to start.
        slots: of which some may be at step 0.
        weights: the slots' own meta-weights, `[T, ...]` by name, or None for the rule's.
    """
    initial = loop.rule.initial_params
    if initial is None:
        return slots
    new = slots.step == 0
    if not bool(new.any()):
        return slots
    params, spec = _find_params(loop, initial, len(slots.ids), weights), loop.family.spec
    begun = slots._replace(
        params=params,
        state=loop.rule.init_state(view_params(loop.rule, spec, params), 1),
        teacher_state=start_teacher(loop.teacher, spec, params.detach()),
    )
    begun = loop.measure_first(begun)
    if bool(new.all()):
        return begun

    def choose(now: Tensor, then: Tensor) -> Tensor:
        return torch.where(new.view(-1, *[1] * (now.ndim - 1)), now, then)

    chosen: Slots = tree_map(choose, begun, slots)
    return chosen


def _find_params(loop: InnerLoop, initial: Params, count: int, weights: Params | None) -> Tensor:
    """The initial parameters of all slots, flat `[T, P]`, differentiable."""
    own = {name: (weights or {}).get(f"{INIT}.{name}") for name in loop.family.spec.names}
    if all(value is None for value in own.values()):
        return loop.family.spec.flatten(initial).expand(count, -1)
    pieces = {name: initial[name].expand(count, *initial[name].shape) if w is None else w for name, w in own.items()}
    return loop.family.spec.flatten(pieces)
