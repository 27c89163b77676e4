"""How the inner loop calls a rule: on flat parameters, with meta-weights that may be each slot's own.

Slots keep parameters as one vector `[T, P]`, because that is one operation where named tensors are many. A rule that
works element by element takes the vector as it is; for any other the vector is cut into the task's named tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lopt.core.tensors import Params, ParamSpec
from lopt.meta.unroll.slots import Slots
from lopt.rules import Rule, State

if TYPE_CHECKING:
    from lopt.meta.unroll.inner_loop import InnerLoop


def view_params(rule: Rule, spec: ParamSpec, flat: Tensor) -> Params:
    """Flat values `[T, P]` under the names and shapes that the rule wants: views, no copies.

    Args:
        spec: names and shapes of the task's parameters.
        flat: parameters or gradients.
    """
    return {"flat": flat} if rule.elementwise else spec.unflatten(flat)


def join_params(rule: Rule, spec: ParamSpec, params: Params) -> Tensor:
    """Flat values `[T, P]` of what the rule has returned: what `view_params` took apart.

    Args:
        spec: the same as there.
        params: by name, `[T, *shape]`.
    """
    return params["flat"] if rule.elementwise else spec.flatten(params)


def call_rule(rule: Rule, weights: Params | None, *args: Any) -> tuple[Params, State]:
    """`rule.update(*args)`, with these meta-weights instead of the rule's own if they are not None.

    Args:
        weights: one set for each slot, `[T, ...]` by name; those that are not named stay the rule's.
        args: gradients, parameters, state, loss and planned steps.
    """
    result: tuple[Params, State] = rule(*args) if weights is None else functional_call(rule, weights, args)
    return result


def update_slots(loop: InnerLoop, slots: Slots, weights: Params | None) -> tuple[Tensor, State]:
    """The rule's step for all slots: parameters `[T, P]` and state after it.

    Args:
        loop: says what the rule is not told, and whether its activations are computed twice.
        slots: with the gradients that the rule is to see.
        weights: the slots' own meta-weights, `[T, ...]` by name, or None for the rule's.
    """
    update, rule, spec = loop.update or partial(call_rule, loop.rule), loop.rule, loop.family.spec
    horizon = slots.horizon
    if loop.hide_end:
        horizon = horizon.masked_fill(loop.draws.hides_end(slots, loop.hide_end), 0)
    grads, params = view_params(rule, spec, slots.grad), view_params(rule, spec, slots.params)
    args = (weights, grads, params, slots.state, slots.loss, horizon)
    # No generator's state is kept for the second time: draws are named, torch's global generator is not used.
    if loop.checkpoint == "update":
        after, state = checkpoint(update, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        after, state = update(*args)
    return join_params(rule, spec, after), state


def compile_rule(rule: Rule) -> Callable[..., tuple[Params, State]]:
    """`call_rule` for this rule through `torch.compile`: one graph for each number of slots.

    It is differentiated once, and not twice: torch does not compile second derivatives.
    """
    return torch.compile(partial(call_rule, rule), dynamic=False)
