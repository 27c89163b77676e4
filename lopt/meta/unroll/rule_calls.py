"""How the inner loop calls a rule: on flat parameters, with meta-weights that may be each slot's own.

Slots keep parameters as one vector `[T, P]`, because that is one operation where named tensors are many. A rule that
works element by element takes the vector as it is; for any other the vector is cut into the task's named tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lopt.core.tensors import Params, ParamSpec
from lopt.rules import Rule, State


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


def compile_rule(rule: Rule) -> Callable[..., tuple[Params, State]]:
    """`call_rule` for this rule through `torch.compile`: one graph for each number of slots.

    It is differentiated once, and not twice: torch does not compile second derivatives.
    """
    return torch.compile(partial(call_rule, rule), dynamic=False)
