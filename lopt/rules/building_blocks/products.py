"""The products of small weights with many elements, each in the form that was measured to be the fastest.

Features lie in rows and elements in columns, so that an MLP of a few units reads long rows. Figures are milliseconds on
one core for the shapes that rules have: weights `[32, 28]` and 41,000 elements (a chunk of the optimizer), or 256
tensors of 1,024 elements (a stack of equal ones, or a population). All forms compute the same sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.tensors import is_traced

Layer = tuple[Tensor, Tensor]
"""Weights `[*batch, out, in]` and biases `[*batch, out]`."""


def multiply(weight: Tensor, x: Tensor) -> Tensor:
    """`weight @ x`: `[*batch, out, in]` times `[*batch, in, N]`; weights without the batch are shared."""
    # With shared weights `matmul` transposes all of x; in a stack of small tensors that is 8 % (0.154 against 0.142).
    return torch.bmm(weight.expand(len(x), *weight.shape[-2:]), x) if x.ndim == 3 else weight @ x


def add_product(base: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`base + weight @ x`, for a base `[*batch, out, N or 1]`: the sum is made where the product is written.

    Under a compiler it is left apart, to be fused with what follows.
    """
    if is_traced():
        return base + multiply(weight, x)
    if weight.ndim == 2 and x.ndim == 2:
        return torch.addmm(base, weight, x)  # with a column for a base 4.1 against 4.8
    if x.ndim == 3:
        return torch.baddbmm(base, weight.expand(len(x), *weight.shape[-2:]), x)  # 50 against 72
    return base + weight @ x


def run_layers(x: Tensor, base: Tensor, weight: Tensor, others: list[Layer], owns_base: bool) -> Tensor:
    """An MLP with ReLU, whose first layer adds its product with x to `base`.

    Args:
        x: `[*batch, in, N]`.
        base: `[*batch, hidden, N]`.
        weight: of the first layer, `[*batch, hidden, in]`.
        others: the layers behind it.
        owns_base: nobody else needs `base`, which may be overwritten.
    Returns:
        The last layer's outputs `[*batch, out, N]`.
    """
    if owns_base and not torch.is_grad_enabled() and weight.ndim == x.ndim == 2:
        hidden = base.addmm_(weight, x)  # 3.7 against 5.0 with memory for the result, which is as large as x
    else:
        hidden = add_product(base, weight, x)
    for weight, bias in others:
        # In place: a product's gradient does not need its result, and ReLU's can be told from its own.
        hidden = add_product(bias[..., None], weight, hidden.relu_())
    return hidden
