"""Losses of many tasks at once, as batched matrix products: what `vmap` would do, in far fewer operations.

Small networks are bound by the number of calls, not by arithmetic. Layers are feature-major, `[T, features, B]`:
products need no transposed copies, and the softmax over few classes runs along the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from lopt.core.tensors import Params

ELEMENTWISE = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.LeakyReLU, nn.Identity)

LAYERS = {nn.Linear, *ELEMENTWISE}
LOSSES = (F.cross_entropy, F.mse_loss)

Loss = Callable[[Tensor, Tensor], Tensor]

TOLERANCE = 1e-9
"""Of a proof in float64, relative to the largest number compared: far above rounding, far below any other network."""


class BatchedLosses:
    """The losses of many copies of a plain sequence of linear layers and `ELEMENTWISE` modules in one go.

    A layer may stand at several places and parameters may be tied; all of them are learned. Subclasses, hooks,
    parametrisations and forward methods of an instance make another network of a layer and are refused.

    Args:
        module: an `nn.Sequential`.
        loss: `F.cross_entropy`, for classes from 0 on as targets, or `F.mse_loss`, which broadcasts.
    Raises:
        ValueError: module or loss is of another kind.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self.module, self.loss = module, loss
        # Of a parameter that is registered several times, `named_parameters` gives the first name, as tasks have it.
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.layers = tuple(module) if isinstance(module, nn.Sequential) else ()
        if not self.layers or not any(loss is known for known in LOSSES) or not self._is_plain():
            raise ValueError(f"{type(module).__name__} is no plain sequence of linear layers, or its loss is another")
        self.steps: list[nn.Module | tuple[str, str | None]] = []
        for layer in self.layers:
            if not isinstance(layer, nn.Linear):
                self.steps.append(layer)
            elif layer.weight in names and (layer.bias is None or layer.bias in names):
                self.steps.append((names[layer.weight], None if layer.bias is None else names[layer.bias]))
            else:
                raise ValueError("a linear layer has weights that are not learned")

    def _is_plain(self) -> bool:
        """Whether calling the module is calling its layers, one after the other, and nothing else."""
        module = self.module
        if type(module) is not nn.Sequential or _is_altered(module) or _has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        return tuple(module) == self.layers and all(type(x) in LAYERS and not _is_altered(x) for x in self.layers)

    def fits(self, module: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> bool:
        """Whether a family's network is still the one that was proven, and its mini-batches of the kind computed here.

        Args:
            module, loss: what the family has now; its users may have put hooks or other layers in.
            x, y: inputs and targets with the dimension `[T]`.
        """
        if module is not self.module or loss is not self.loss or x.ndim != 3 or not self._is_plain():
            return False
        if loss is F.cross_entropy:
            return y.dtype == torch.int64 and y.ndim == 2
        return y.is_floating_point() and y.ndim == 3

    def __call__(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Losses `[T]`, differentiable in the parameters.

        Args:
            params: `[T, ...]` by name.
            x: inputs `[T, B, in]`.
            y: classes int64 `[T, B]`, or targets `[T, B, out]`.
        """
        h = x.mT
        for step in self.steps:
            if isinstance(step, nn.Module):
                h = step(h)
            else:
                weight, bias = params[step[0]], None if step[1] is None else params[step[1]]
                h = weight @ h if bias is None else torch.baddbmm(bias[..., None], weight, h)
        h = h.to(x.dtype)  # under autocast the products are rounded: the loss is not, as torch's own are not
        if self.loss is F.mse_loss:
            return (h - y.mT).square().mean((1, 2))
        return -h.log_softmax(1).gather(1, y[:, None])[:, 0].mean(1)


def find_batched(module: nn.Module, loss: Loss, params: Params, x: Tensor, y: Tensor) -> BatchedLosses | None:
    """The batched losses of a module, if they are proven to be those of the module called task by task.

    Losses and gradients are compared in float64, where rounding is no excuse.

    Args:
        module: any.
        loss: any, `loss(output, target) -> scalar`.
        params: of several tasks, `[T, ...]` by name, other ones for each.
        x, y: their inputs and targets, `[T, B, ...]`.
    Returns:
        None where the module or loss is not of the kind that can be batched so, or the numbers differ.
    """
    try:
        batched = BatchedLosses(module, loss)
        if not batched.fits(module, loss, x, y):
            return None
        params = {k: p.detach().double().requires_grad_() for k, p in params.items()}
        x, y = x.double(), y.double() if y.is_floating_point() else y
        found = batched(params, x, y)
        tasks = [{k: p[i] for k, p in params.items()} for i in range(len(x))]
        right = torch.stack([loss(call_module(module, p, x[i]), y[i]) for i, p in enumerate(tasks)])
        pairs = [
            (found.detach(), right.detach()),
            *zip(differentiate(found, params), differentiate(right, params), strict=True),
        ]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    # Gradients are compared by their largest element: some are zero but for rounding.
    scale = max(float(b.abs().max()) for _, b in pairs)
    return batched if all(float((a - b).abs().max()) <= TOLERANCE * scale for a, b in pairs) else None


def call_module(module: nn.Module, params: Params, x: Tensor) -> Any:
    """What a module gives for an input with other parameters than its own, pure and under torch's transforms.

    `functional_call` finds tied parameters by itself, but leaves a submodule that is registered under several names
    with the parameters it was handed; so each place of a parameter is named here once, by the module that holds it.

    Args:
        params: by the names of `module.named_parameters()`; those that are not there stay the module's own.
    """
    names: dict[Tensor, str] = {}
    tied = {}
    for prefix, part in module.named_modules():
        for key, p in part._parameters.items():
            name = f"{prefix}.{key}" if prefix else key
            if p is not None and names.setdefault(p, name) in params:
                tied[name] = params[names[p]]
    return functional_call(module, params | tied, (x,), tie_weights=False)


def differentiate(losses: Tensor, params: Params) -> list[Tensor]:
    """Gradients of the sum of losses, in the order of the parameters; zeros for those that no loss depends on.

    Args:
        losses: of any shape.
        params: leaves that require gradients.
    """
    grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True, materialize_grads=True)
    return list(grads)


def _is_altered(layer: nn.Module) -> bool:
    """Whether a call of the layer is more than the forward method of its class."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__
