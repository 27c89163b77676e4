"""Losses of many tasks at once, as batched matrix products: what `vmap` would do, in far fewer operations.

Small networks are bound by the number of calls, not by arithmetic. Layers are feature-major, `[T, features, B]`:
products need no transposed copies, and the softmax over few classes runs along the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.tensors import Params

ELEMENTWISE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.LeakyReLU, nn.Identity)

Losses = Callable[[Params, Tensor, Tensor], Tensor]
"""Losses `[T]` of parameters `[T, ...]`, inputs `[T, B, in]` and targets `[T, B]` or `[T, B, out]`."""


def batch_losses(module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Losses | None:
    """The losses of many copies of `module` in one go, or None where it is not a plain sequence of linear layers.

    Args:
        module: an `nn.Sequential` of `nn.Linear` and `ELEMENTWISE` modules, all of whose parameters are learned.
        loss: `F.cross_entropy` with classes from 0 on as targets, or `F.mse_loss`, which broadcasts.
    """
    if type(module) is not nn.Sequential or loss not in (F.cross_entropy, F.mse_loss):
        return None
    if not all(isinstance(layer, (nn.Linear, *ELEMENTWISE)) for layer in module) or not len(module):
        return None
    if any(layer.weight.ndim != 2 for layer in module if isinstance(layer, nn.Linear)):
        return None
    if not all(p.requires_grad for p in module.parameters()):
        return None

    def compute(params: Params, x: Tensor, y: Tensor) -> Tensor:
        h = x.mT
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
                h = weight @ h if bias is None else torch.baddbmm(bias[..., None], weight, h)
            else:
                h = layer(h)
        if loss is F.mse_loss:
            return (h - y.mT).square().mean((1, 2))
        return -h.log_softmax(1).gather(1, y[:, None])[:, 0].mean(1)

    return compute
