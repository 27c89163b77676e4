"""Imitating a teacher: another rule makes the same steps beside the learned one (Chen et al. 2020, arXiv 2010.09089).

The distance between their steps is a loss that can be learned from long before training losses tell anything, and
tasks that take the teacher's steps show the rule states that it would not come to by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.tensors import ParamSpec
from lopt.meta.unroll.rule_calls import join_params, view_params
from lopt.meta.unroll.slots import Slots
from lopt.rules import Rule, State


def start_teacher(teacher: Rule | None, spec: ParamSpec, params: Tensor) -> State | tuple[()]:
    """The teacher's memory at the start of tasks; empty without a teacher, so that it takes no place in a carry.

    Args:
        spec: names and shapes of the parameters.
        params: initial ones, `[T, P]`.
    """
    return () if teacher is None else teacher.init_state(view_params(teacher, spec, params), 1)


def imitate(
    teacher: Rule, spec: ParamSpec, slots: Slots, params: Tensor, follows: Tensor
) -> tuple[Tensor, State, Tensor]:
    """Compare the rule's step with the teacher's, from the same parameters, gradient and loss.

    Args:
        spec: names and shapes of the parameters.
        slots: before the step, with gradients as the rule has seen them.
        params: `[T, P]` after the rule's step; differentiable.
        follows: bool `[T, 1]`, the tasks that take the teacher's step.
    Returns:
        Parameters after the step that is taken `[T, P]`, the teacher's memory, and half the mean squared distance of
        the two steps `[T]`, differentiable in the rule's.
    """
    assert isinstance(slots.teacher_state, State)
    # It sees what the rule sees, delivered gradients included; nothing of it is learned, so it needs no graph.
    with torch.no_grad():
        grads, before = (view_params(teacher, spec, x) for x in (slots.grad, slots.params))
        taught, state = teacher.update(grads, before, slots.teacher_state, slots.loss, slots.horizon)
    target = join_params(teacher, spec, taught)
    distance = 0.5 * (params - target).square().mean(-1)
    return torch.where(follows, target, params), state, distance
