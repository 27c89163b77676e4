"""Steps that are computed again in backward: of a step only what goes in is kept, and nothing of its graph.

torch's own checkpoints keep what a gradient within them has needed, and for second order every step has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopt.core.tensors import Params
from lopt.meta.unroll.draws import Batches
from lopt.meta.unroll.slots import Slots

if TYPE_CHECKING:
    from lopt.meta.unroll.inner_loop import InnerLoop

Run = Callable[..., list[Tensor]]


def call_step(loop: InnerLoop, slots: Slots, weights: Params | None, batches: Batches, *, last: bool) -> Any:
    """`loop.step`, computed again in backward where the loop's checkpoint is "step"."""
    if loop.checkpoint != "step" or not torch.is_grad_enabled():
        return loop.step(slots, weights, batches, last=last)
    learned = list(loop.rule.meta_weights().values())
    return recompute(lambda given: loop.step(given, weights, batches, last=last), slots, learned)


def recompute(function: Callable[[Any], Any], given: Any, weights: Sequence[Tensor]) -> Any:
    """`function(given)`, differentiable once in what is given and in the weights.

    Args:
        function: pure, on trees of tensors; it is called without derivatives now, and with them in backward.
        given: a tree of tensors.
        weights: leaves that the function reads beside them.
    """
    leaves, structure = tree_flatten(given)
    structures = []

    def run(*tensors: Tensor) -> list[Tensor]:
        made, of = tree_flatten(function(tree_unflatten(tensors, structure)))
        structures.append(of)
        return made

    made = _Recomputed.apply(run, len(leaves), *leaves, *weights)  # type: ignore[no-untyped-call]
    return tree_unflatten(made, structures[0])


class _Recomputed(torch.autograd.Function):
    """`run(*leaves)`; the tensors behind the first `count` are weights, which `run` reads by itself."""

    @staticmethod
    def forward(ctx: Any, run: Run, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = run(*tensors[:count])
        ctx.run, ctx.count, ctx.weights = run, count, tensors[count:]
        ctx.save_for_backward(*tensors[:count])
        # What is passed on as it came must not become differentiable by that: tasks, and the batches made of them.
        constant = {id(x) for x in tensors if not x.requires_grad}
        kept = [not x.is_floating_point() or id(x) in constant for x in made]
        made = [x.view_as(x) for x in made]
        ctx.mark_non_differentiable(*(x for x, fixed in zip(made, kept, strict=True) if fixed))
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed[: ctx.count], strict=True)
            ]
            made = ctx.run(*leaves)
        pairs = [(x, g) for x, g in zip(made, grads, strict=True) if g is not None and x.requires_grad]
        inputs = [x for x, need in zip([*leaves, *ctx.weights], needed, strict=True) if need]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs and inputs:
            ends, slopes = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, inputs, slopes, allow_unused=True)
        rest = iter(found)
        return None, None, *(next(rest) if need else None for need in needed)
