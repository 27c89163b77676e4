"""An optimizer's parameters as the kernels take them: in the order of their memory, without anything being moved.

Only state that lies in another order than its parameter is laid out anew, once, and parameters with gaps are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lopt.optim.units import Member
from lopt.rules.layout import Layout, find_layout
from lopt.rules.programs.views import Order, ParameterView, arrange, find_order


def make_part(item: int, member: Member, rows: Sequence[str], suits: Callable[[Layout, Order], bool]) -> ParameterView:
    """A member as a part. State that lies in another order than the parameter is laid out anew, once.

    Args:
        rows: names of accumulators that belong to a tensor as a whole.
        suits: whether the kernels take a layout in this order; else, and where a parameter has gaps, they work on a
            copy in torch's order.
    """
    layout = find_layout(tuple(member.p.shape))
    p, source = member.p.detach().reshape(layout.shape), None
    # Any order without gaps will do for most kernels: parameters of convolutions in "channels last" stay as they are.
    order = find_order(p)
    if order is None or not suits(layout, order):
        order = tuple(range(layout.ndim))
        if not p.is_contiguous():
            p, source = torch.empty(layout.shape, dtype=p.dtype, device=p.device), member.p.detach()
    # What belongs to the tensor as a whole has no elements that could lie in an order.
    state = {}
    for key, x in member.pick_accumulators().items():
        state[key] = x if key in rows else arrange(x, order)
    return ParameterView(item, p.permute(order), state, layout, order, source)
