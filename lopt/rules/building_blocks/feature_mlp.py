"""Shared core of the rules whose policy is a small MLP on features of each element, normalised per tensor.

Nothing of the size (features x elements) is made but for a chunk: features that rows or columns share enter the first
layer through their own small products, features that all elements share through its bias, and the normalisation
through its weights. Layers are feature-major: weights `[out, in]` times features `[in, elements]`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from lopt_kernels.differentiable import mlp as mlp_autograd
from torch import Tensor, nn

from lopt.core.random import draw_truncated_normal, make_generator
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.products import Layer, add_product, multiply, run_layers
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Decision, Elements, Means, Visit

MAX_HIDDEN = 1024  # a foreign file must not make us allocate gigabytes before its shapes are compared
MAX_LAYERS = 8

FEATURES = "features"


class Inputs(NamedTuple):
    """Which inputs of the first layer are which features.

    Attributes:
        elements: features of the elements, in pieces that follow each other in `FeatureMLP.element_features`.
        lines: features that rows or columns share, likewise, by the name of their group.
        constants: features that all elements share.
    """

    elements: list[slice]
    lines: dict[str, list[slice]]
    constants: slice


class NormalisedLayer(NamedTuple):
    """The first layer as one tensor has it for one step, with all that its elements share folded in.

    Attributes:
        weight: of the element features, `[*batch, hidden, k]`.
        bias: with the constant features' part, `[*batch, hidden]`.
        line_weights: of each group of line features, `[*batch, hidden, k]`.
        scaled: a tensor's features are normalised in several parts, such as one matrix for each position of a window:
            the factors are fields. Otherwise the weights contain them.
    """

    weight: Tensor
    bias: Tensor
    line_weights: dict[str, Tensor]
    scaled: bool


class TensorMLP(NamedTuple):
    """The MLP of one tensor for one step: what `FeatureMLP.decide` makes of sums, and `move` runs on the elements.

    Attributes:
        first: the first layer.
        others: those behind it.
        gain: factor on the step, `[*batch]`.
    """

    first: NormalisedLayer
    others: list[Layer]
    gain: Tensor


def repeat_width(hidden: int, hidden_layers: int) -> list[int]:
    """The widths of equal hidden layers, as an MLP takes them.

    Raises:
        ValueError: more layers than `MAX_LAYERS`, or none.
    """
    if not 1 <= hidden_layers <= MAX_LAYERS:  # a foreign number: no list is as long before it is known
        raise ValueError(f"hidden_layers must be from 1 to {MAX_LAYERS}, got {hidden_layers}")
    return [hidden] * hidden_layers


class FeatureMLP(Rule):
    """`delta = -gain * d * exp(exp_mult * a)`, with (d, a) from an MLP with ReLU on normalised features.

    The first layer's inputs are the element features, the line features and the constant ones, in the order that
    `find_inputs` gives.

    Args:
        widths: inputs, hidden layers, outputs.
        seed: of the initial meta-weights: normal, std 1/sqrt(fan_in), cut at two of them; biases 0.
        bank: leading dimensions of all weights, for rules that mix several MLPs.
    """

    norm_eps: float = 1e-5
    exp_mult: float = 1e-3

    def __init__(self, widths: list[int], seed: int, bank: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not all(1 <= width <= MAX_HIDDEN for width in widths):
            raise ValueError(f"hidden widths must be from 1 to {MAX_HIDDEN}, got {widths}")
        self.widths = widths
        self.temporaries = widths[0] + 2 * max(widths[1:])
        generator = make_generator(seed)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            weight = draw_truncated_normal((*bank, fan_out, fan_in), 1 / sqrt(fan_in), generator)
            self.register_parameter(f"w{i}", nn.Parameter(weight))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(*bank, fan_out, dtype=torch.float32)))

    # -- what a rule says of itself ------------------------------------------------------------------------------------

    @abstractmethod
    def element_features(self, e: Elements) -> list[features.Piece]:
        """Features of the elements, from the new accumulators.

        Returns:
            Groups `[*batch, k, *shape]`, in the order of the first layer's inputs; a pair of tensors stands for their
            product, which is written straight to its place.
        """

    def line_features(self, acc: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """Features that rows or columns share, in named groups `[*batch, k, *shape or 1s]`; a vector has none.

        They enter the first layer through products of their own, one per row instead of one per element.
        """
        return {}

    def constant_features(self, clock: Clock) -> Tensor | None:
        """Features that all elements share, `[*batch, k]`; not normalised."""
        return None

    @abstractmethod
    def find_inputs(self, layout: Layout) -> Inputs:
        """Which inputs of the first layer a parameter's features are.

        Weights keep the published order of features, in which the groups lie scattered; vectors may leave some out.
        """

    def norm_axes(self, layout: Layout) -> tuple[int, ...]:
        """The axes over which features are normalised: all of them, unless a rule treats a tensor as many matrices."""
        return layout.axes

    def layers(self, shared: Means) -> list[Layer]:
        """The MLP, given what `decide_together` has the tensor share."""
        return [(getattr(self, f"w{i}"), getattr(self, f"b{i}")) for i in range(1, len(self.widths))]

    @abstractmethod
    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        """Factor on the step `[*batch]`, in which a rule has its step size and its schedule.

        Args:
            mean_squares: of the element features, `[*batch, k]`; that of the parameter is among them.
            shared: of this tensor, from the earlier stages.
        """

    def join_features(self, e: Elements) -> tuple[Tensor, Accumulators]:
        """The element features `[*batch, k, *shape]`, and the fields that save `move` from making them again."""
        joined = features.join_pieces(self.element_features(e), e.p, e.layout.ndim)
        return joined, {FEATURES: joined} if e.whole else {}

    # -- stages --------------------------------------------------------------------------------------------------------

    def begin_step(self, clock: Clock) -> Means:
        constant = self.constant_features(clock)
        return {} if constant is None else {"constant": constant}

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        """The first layer, with everything that is not an element's own folded in."""
        axes, ndim = self.norm_axes(layout), layout.ndim
        (weight, bias), *others = self.layers(shared)
        inputs = self.find_inputs(layout)
        if "constant" in shared:
            bias = add_product(bias[..., None], weight[..., inputs.constants], shared["constant"][..., None])[..., 0]

        # Line features are fields, so that a chunk gets the rows and columns that are its own.
        lines = self.line_features(acc, layout)
        fields = {_name_line(key): line for key, line in lines.items()}
        # All rows have equally many elements, so the mean over rows is that over elements, without a pass over these.
        squares = {FEATURES: means["squares"]}
        squares |= {_name_line(key): line.square().mean(axes, keepdim=True) for key, line in lines.items()}
        widths = [square.shape[-ndim - 1] for square in squares.values()]
        pieces = [weight[..., piece] for group in (inputs.elements, *inputs.lines.values()) for piece in group]
        first = torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

        # One number per tensor and feature scales the weights, which is cheaper than scaling features.
        scaled = any(square.shape[square.ndim - ndim :].numel() != 1 for square in squares.values())
        if scaled:
            fields |= {_name_scale(key): (square + self.norm_eps).rsqrt() for key, square in squares.items()}
        else:
            mean_squares = torch.cat([square.flatten(-ndim)[..., 0] for square in squares.values()], -1)
            first = first * (mean_squares + self.norm_eps).rsqrt().unsqueeze(-2)
        weight, *line_weights = torch.split(first, widths, -1)
        gain = self.gain(means["squares"].flatten(-ndim).mean(-1), shared)
        layer = NormalisedLayer(weight, bias, dict(zip(lines, line_weights, strict=True)), scaled)
        return Decision(fields=fields, decided=TensorMLP(layer, others, gain))

    def move(self, e: Elements, decided: TensorMLP) -> Visit:
        ndim, shape = e.layout.ndim, e.p.shape[e.p.ndim - e.layout.ndim :]
        first, others, gain = decided
        x = e.acc[FEATURES] if FEATURES in e.acc else self.join_features(e)[0]
        if first.scaled:
            x = x * e.acc[_name_scale(FEATURES)]
        x = x.flatten(-ndim)
        base = _add_lines(first, e)  # [*batch, hidden, *shape or 1s]
        if mlp_autograd.can_run(x, base, first.weight, others):
            same = base.shape[-ndim:].numel() == 1  # the kernel broadcasts one column by itself
            base = base if same else base.expand(*base.shape[:-ndim], *shape)
            hidden = mlp_autograd.run_mlp(x, base.flatten(-ndim), first.weight, others)
        else:
            base = base.expand(*base.shape[:-ndim], *shape).flatten(-ndim)
            # Without lines the base is the bias, seen once per element.
            hidden = run_layers(x, base, first.weight, others, owns_base=len(first.line_weights) > 0)
        step = hidden[..., 0, :]
        # Where exp_mult is 0 the network may lack the second output.
        if self.exp_mult:
            step = step * torch.exp(self.exp_mult * hidden[..., 1, :])
        return Visit(delta=(step * -gain[..., None]).reshape(e.p.shape))


def _add_lines(first: NormalisedLayer, e: Elements) -> Tensor:
    """What bias and line features add to the first layer, `[*batch, hidden, *shape or 1s]`.

    A row's part is one small product for all its elements, and is broadcast against those of the columns.
    """
    ndim = e.layout.ndim
    base = features.spread(first.bias, ndim)
    for i, (key, weight) in enumerate(first.line_weights.items()):
        name = _name_line(key)
        line = e.acc[name] * e.acc[_name_scale(name)] if first.scaled else e.acc[name]
        flat = line.flatten(-ndim)
        product = add_product(first.bias[..., None], weight, flat) if i == 0 else multiply(weight, flat)
        product = product.reshape(*product.shape[:-1], *line.shape[-ndim:])
        base = product if i == 0 else base + product
    return base


def _name_line(key: str) -> str:
    """The field of a group of line features."""
    return f"line_features.{key}"


def _name_scale(name: str) -> str:
    """The field of the factors that bring the features of a field to rms 1."""
    return f"{name}.scale"
