"""A model adapted to a few examples by a learned initialisation, or by any rule from where the model is.

No graph is kept from step to step, so memory does not grow with them. It is the rule's own step on whole tensors, as in
meta-training, and no `torch.optim.Optimizer`: a handful of steps on a handful of examples.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from lopt.core.tensors import Params
from lopt.rules import LearnedInit, Rule
from lopt.rules.files import load

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[Any, Any], Tensor]
Slopes = Callable[[Params], tuple[Params, Tensor]]
"""Gradients and loss at some parameters."""


def adapt(
    model: Model, rule: Rule | str | os.PathLike[str], support: tuple[Any, Any], *, loss: Loss, steps: int = 1
) -> Model:
    """A copy of the model, adapted to a few examples; the model itself is left alone.

    Args:
        model: its parameters that require gradients are adapted; they are float32.
        rule: a `LearnedInit`, from whose start the copy goes, or any other rule, for which it goes from where the
            model is; or the name or file of one.
        support: inputs, with which the model is called, and targets.
        loss: `loss(model(inputs), targets) -> scalar`.
        steps: of the rule, all on the whole support; 0 is the start.
    Returns:
        The copy, in the mode that the model is in, without gradients.
    Raises:
        ValueError: the rule is of a model with other names or shapes, parameters are not float32, or the adaptation
            diverges.

    >>> import lopt, torch
    >>> from lopt.rules import LearnedInit
    >>> rule = LearnedInit({"weight": [1, 1]}, "sgd", {"lr": 0.25})
    >>> x = torch.ones(4, 1)
    >>> fitted = lopt.adapt(torch.nn.Linear(1, 1, bias=False), rule, (x, 2 * x), loss=torch.nn.functional.mse_loss)
    >>> fitted.weight.item()  # from 0, half of the way
    1.0
    """
    copy = deepcopy(model)
    rule, start = _prepare(copy, rule, steps)
    x, y = support

    def measure(params: Params) -> tuple[Params, Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            value = loss(functional_call(copy, leaves, (x,)), y)
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True)), value.detach()

    adapted = _make_steps(rule, start, measure, steps, 0)
    if not all(bool(p.isfinite().all()) for p in adapted.values()):
        raise ValueError(f"the adaptation diverges within {steps} steps: take fewer, or look for NaN in the support")
    own = dict(copy.named_parameters())
    with torch.no_grad():
        for name, p in adapted.items():
            own[name].copy_(p)
    copy.zero_grad()
    return copy


def adapt_all(
    model: nn.Module, rule: Rule | str | os.PathLike[str], support: tuple[Tensor, Tensor], *, loss: Loss, steps: int = 1
) -> Params:
    """The parameters of T models, each adapted to a task of its own, all at once.

    Args:
        support: inputs `[T, K, ...]` and targets `[T, K, ...]`; the rest as in `adapt`. The model is batched over
            tasks with `torch.func.vmap`.
    Returns:
        By name, `[T, *shape]`: `vmap(lambda p, x: functional_call(model, p, (x,)))` calls them. Where a task diverges
        they are not finite.
    Raises:
        ValueError: as in `adapt` but for tasks that diverge, or inputs and targets are of different numbers of tasks.
    """
    rule, start = _prepare(model, rule, steps)
    x, y = support
    if len(x) != len(y):
        raise ValueError(f"support needs inputs and targets [T, K, ...] of as many tasks, got {len(x)} and {len(y)}")

    def measure_one(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def measure(params: Params) -> tuple[Params, Tensor]:
        slopes: Params
        slopes, value = vmap(grad_and_value(measure_one))(params, x, y)
        return slopes, value

    return _make_steps(rule, {name: p.expand(len(x), *p.shape) for name, p in start.items()}, measure, steps, 1)


def _prepare(model: nn.Module, rule: Rule | str | os.PathLike[str], steps: int) -> tuple[Rule, Params]:
    """The rule where the model is, and the parameters to start from, by name in the model's order."""
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    dtypes = {p.dtype for p in own.values()}
    if dtypes != {torch.float32}:
        raise ValueError(f"a model is adapted in float32, and its parameters are {sorted(map(str, dtypes)) or 'none'}")
    rule = rule if isinstance(rule, Rule) else load(rule)
    rule = deepcopy(rule).to(next(iter(own.values())).device)
    if not isinstance(rule, LearnedInit):
        return rule, own
    rule.check_shapes({name: tuple(p.shape) for name, p in own.items()})
    trained = rule.trained_steps
    if rule.scaling != "none" and 0 < trained < steps:
        warnings.warn(
            f"learned rates were trained for {trained} steps and may diverge in {steps}: train with more", stacklevel=3
        )
    return rule, {name: rule.initial_params[name].detach() for name in own}


@torch.no_grad()
def _make_steps(rule: Rule, params: Params, measure: Slopes, steps: int, batch_ndim: int) -> Params:
    """The parameters after `steps` steps of the rule."""
    state = rule.init_state(params, batch_ndim)
    planned = torch.full_like(state.step, steps)
    for _ in range(steps):
        grads, value = measure(params)
        params, state = rule.update(grads, params, state, value, planned)
    return params
