"""What the differentiable formulas share: when their kernels run, and that they are differentiated once only.

A formula here is one function with the arguments and results of its plain-PyTorch reference. Its forward pass is one
launch that keeps inputs and results; its backward pass is a launch that computes the activations again.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lopt_kernels.launching.language import triton
from lopt_kernels.launching.op import CompileSource

_references = 0  # how many `use_references` are entered; not thread-local: autograd recomputes in threads of its own


@dataclass(frozen=True)
class DifferentiableOp:
    """One formula whose forward and backward passes are fused.

    Attributes:
        name: the key in `DIFFERENTIABLE_OPS`.
        reference: plain PyTorch, differentiable any number of times: the specification.
        run: the same values from one Triton launch, and gradients of first order.
        sample: `(num_slots, num_coordinates, generator, dtype, device, **sizes)` -> positional arguments of both.
        bytes_moved: `(num_slots, num_coordinates, **sizes)` -> bytes that forward and backward pass have to read and
            write, if every input needs a gradient.
        compile_sources: dtype of the state -> kernels by what they do, specialised to what `sample` draws.
        state_dtypes: what the state may be; float32 where there is none.
        block: coordinates per program.
    """

    name: str
    reference: Callable[..., Any]
    run: Callable[..., Any]
    sample: Callable[..., tuple[Any, ...]]
    bytes_moved: Callable[..., tuple[int, int]]
    compile_sources: Callable[..., dict[str, CompileSource]]
    state_dtypes: tuple[torch.dtype, ...]
    block: int


def can_launch(device: torch.device) -> bool:
    """Whether kernels can run for tensors on `device`: Triton is installed and it is a CUDA device.

    The interpreter does not count, as it is for tests: elsewhere meta-training differentiates the references.
    """
    return triton is not None and device.type == "cuda"


def can_differentiate(*tensors: Tensor) -> bool:
    """A differentiable kernel is what should run on these tensors, as far as this does not depend on the formula.

    That is: gradients are wanted, by ordinary autograd (torch.compile and torch.func see through references only),
    everything is float32 on a GPU, and nobody asked for references.
    """
    return (
        torch.is_grad_enabled()
        and not _references
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and can_launch(tensors[0].device)
        and all(t.dtype == torch.float32 for t in tensors)
    )


@contextmanager
def use_references() -> Iterator[None]:
    """Within this context rules run references instead of fused kernels, in all threads.

    Slower, but differentiable any number of times, as second derivatives need. Contexts may be nested.
    """
    global _references
    _references += 1
    try:
        yield
    finally:
        _references -= 1


def differentiate_once(
    op: str, gradient: Callable[..., Sequence[Tensor | None]], *args: Any
) -> tuple[Tensor | None, ...]:
    """`gradient(*args)`, whose own derivative is refused.

    Args:
        op: the name of the formula, for the message.
        gradient: what the backward pass of a `Function` does.
        args: its arguments; tensors must not be hidden in containers.
    Returns:
        What `gradient` returns; differentiating it raises a RuntimeError.
    """
    result: tuple[Tensor | None, ...] = _Gradient.apply(op, gradient, *args)
    return result


class _Gradient(Function):
    """A node of the graph of gradients that cannot be passed."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Callable[..., Sequence[Tensor | None]], *args: Any) -> Any:
        ctx.op = op
        return tuple(gradient(*args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.op} kernel: its gradient was asked for a derivative, and the fused backward pass is of first order "
            "only. Run the forward pass inside `with lopt_kernels.differentiable.autograd.use_references():`, which "
            "computes the same in plain PyTorch, differentiable any number of times."
        )


def flatten_slots(x: Tensor, batch: torch.Size, own: int) -> Tensor:
    """Batch dimensions as the one dimension of slots that kernels take: `[*batch, ...]` -> contiguous `[S, ...]`.

    Args:
        x: any dtype; batch dimensions that are missing or 1 are expanded.
        batch: their sizes, with the product S; empty: S is 1.
        own: how many of the last dimensions are the tensor's own.
    """
    shape = x.shape[x.ndim - own :]
    return x.expand(*batch, *shape).reshape(prod(batch), *shape).contiguous()


def check_tensor(op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """`tensor` ends in `shape`, and what is in front can be expanded to the batch dimensions of x, `[*batch, F, N]`.

    Raises:
        ValueError: it does not, or its dtype is not `dtype`, or it is not on its device.
    """
    own, batch = len(shape), x.shape[:-2]
    lead = tensor.shape[: tensor.ndim - own]
    # leading dimensions are broadcast from behind, as torch does it
    pairs = zip(reversed(lead), reversed(batch), strict=False)
    if tensor.ndim < own or tuple(tensor.shape[tensor.ndim - own :]) != tuple(shape):
        raise ValueError(
            f"{op} kernel: {name} must have shape [..., {', '.join(map(str, shape))}], got {list(tensor.shape)}."
        )
    if len(lead) > len(batch) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"{op} kernel: the leading dimensions of {name} must be absent or those of x, {list(batch)}; "
            f"its shape is {list(tensor.shape)}."
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{op} kernel: {name} must be {dtype}, got {tensor.dtype}. Convert it, or use the reference.")
    if tensor.device != x.device:
        raise ValueError(f"{op} kernel: {name} is on {tensor.device}, x on {x.device}. Move one of them.")
