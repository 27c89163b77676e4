"""A rule and its parameters as the kernels of the MLPs on features see them."""

from __future__ import annotations

import torch
from lopt_kernels.feature_mlp import features, fold
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.feature_mlp.tiling import Shape
from torch import Tensor

from lopt.rules import find_layout
from lopt.rules.building_blocks.factored_mlp import FactoredMLP
from lopt.rules.building_blocks.feature_mlp import FeatureMLP
from lopt.rules.celo2 import Celo2
from lopt.rules.layout import Layout
from lopt.rules.mlp import DECAYS
from lopt.rules.programs.views import Order, ParameterView


def describe_family(rule: FeatureMLP) -> Family:
    """The features of a rule."""
    if not isinstance(rule, FactoredMLP):
        return Family(momenta=len(DECAYS), factored=False)
    return Family(3, True, rule.clips, rule.rs_eps, rule.vector_eps, isinstance(rule, Celo2))


def describe_shape(rule: FeatureMLP) -> Shape:
    """The MLP of a rule."""
    hidden = rule.widths[1:-1]
    return Shape(hidden[0], len(hidden), rule.widths[-1], rule.exp_mult)


def describe_view(rule: FeatureMLP, view: ParameterView, slot: int) -> Tensors:
    """A parameter with its accumulators; scales of lines are made here."""
    state, layout = view.state, view.layout
    t = Tensors(view.p, view.p, state["m"], state.get("v"), slot=slot)
    divided = find_divided(rule, layout, view.order)
    if divided and view.p.numel():
        sizes = view.p.shape
        t = t._replace(groups=sizes[divided[0] : divided[-1] + 1].numel(), inner=sizes[divided[-1] + 1 :].numel())
    if "averages" in state:
        return t._replace(first=state["averages"], second=state["averages"])
    if not isinstance(rule, FactoredMLP):
        return t
    assert layout.factored is not None, "vectors have averages"
    larger, smaller = (view.place(axis) for axis in layout.factored)
    keys = ("rows", "cols") if larger > smaller else ("cols", "rows")  # the first line is of means over the later axis
    first, second = (state[key] for key in keys)
    # The launches on lines write these before others read them, in every step.
    scales = torch.empty_like(first), torch.empty_like(second)
    return t._replace(
        first=first,
        second=second,
        first_scale=scales[0],
        second_scale=scales[1],
        axes=(min(larger, smaller), max(larger, smaller)),
        rows=keys.index("rows"),
    )


def pack_weights(rule: FeatureMLP, family: Family) -> Tensor:
    """The meta-weights as `lopt_kernels.feature_mlp.fold` wants them, `[1 or slots or bank or slots bank, T]`."""
    # A matrix has every feature that there is; vectors lack some.
    inputs = rule.find_inputs(find_layout((2, 2)))
    layers = [(getattr(rule, f"w{i}").detach(), getattr(rule, f"b{i}").detach()) for i in range(1, len(rule.widths))]
    layers = [(weight.reshape(-1, *weight.shape[-2:]), bias.reshape(-1, bias.shape[-1])) for weight, bias in layers]
    (weight, bias), *others = layers
    pieces = [piece for group in (inputs.elements, *inputs.lines.values()) for piece in group]
    first = torch.cat([weight[..., piece] for piece in pieces], -1)
    assert first.shape[-1] == family.num_inputs, "the families' features are the rules'"
    return fold.pack(first, bias, weight[..., inputs.constants], [x for layer in others for x in layer])


def find_divided(rule: FeatureMLP, layout: Layout, order: Order) -> list[int]:
    """Places, in the order of memory, of the axes over which features are not normalised together; not of size 1."""
    together = rule.norm_axes(layout)
    apart = [axis % layout.ndim for axis in layout.axes if axis not in together and layout.shape[axis] != 1]
    return sorted(order.index(axis) for axis in apart)


def join_decays(rule: FeatureMLP) -> Tensor:
    """Decays `[(slots,) k]` of momenta, second moment, factored moments; for momenta only, with ones behind theirs."""
    if isinstance(rule, FactoredMLP):
        return torch.cat(rule.decays(), -1)
    decays = rule.get_buffer("decays")
    return torch.cat([decays, decays.new_ones(1 + features.LINES)])
