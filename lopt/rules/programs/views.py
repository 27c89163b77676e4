"""Parameters and their state in the order of their memory, as kernels walk through them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators

Order = tuple[int, ...]


class ParameterView(NamedTuple):
    """One parameter as the kernels walk through it: flat in memory, with its accumulators in the same order.

    Attributes:
        number: which parameter of the step it is; kernels find its gradient and rates in tables by it.
        p: contiguous `[*shape]`, in the order of its memory; at least one dimension.
        state: accumulators `[(features,) *shape or 1s]`, contiguous in the same order; those of the rule's
            `tensor_keys` as they are.
        layout: of the parameter, in torch's order.
        order: the axes in the order of memory.
        source: the parameter, where `p` is a copy of it.
        slot: its row of stacks of meta-weights.
    """

    number: int
    p: Tensor
    state: Accumulators
    layout: Layout
    order: Order
    source: Tensor | None
    slot: int = 0

    def release(self) -> ParameterView:
        """The view without tensors that belong to the optimizer: what holds it does not keep their memory."""
        p = self.p if self.source is not None else torch.empty(self.p.shape, dtype=self.p.dtype, device="meta")
        return self._replace(p=p, state={})

    def place(self, axis: int) -> int:
        """Where an axis of the layout is in the order of memory."""
        return self.order.index(axis % self.layout.ndim)


def find_order(x: Tensor) -> Order | None:
    """The order of axes in which a tensor is contiguous, or None if it has gaps or overlaps."""
    if x.is_contiguous():
        return tuple(range(x.ndim))
    # The stride of a dimension of size 1 says nothing: such dimensions come first.
    strides = [stride if size > 1 else 2**62 for size, stride in zip(x.shape, x.stride(), strict=True)]
    order = tuple(sorted(range(x.ndim), key=lambda axis: (-strides[axis], axis)))
    return order if x.permute(order).is_contiguous() else None


def arrange(x: Tensor, order: Order) -> Tensor:
    """A view `[(features,) *shape in order]` of state `[(features,) *shape]`, whose memory is put in that order."""
    lead = x.ndim - len(order)
    axes = (*range(lead), *(lead + axis for axis in order))
    if not x.permute(axes).is_contiguous():
        back = sorted(range(len(axes)), key=axes.__getitem__)
        x.data = x.permute(axes).contiguous().permute(back)  # the optimizer's own tensor, with other strides
    return x.permute(axes)
