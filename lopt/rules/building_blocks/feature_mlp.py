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

from lopt.core.random import make_generator
from lopt.core.tensors import is_traced
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Decision, Elements, Means, Visit

MAX_HIDDEN = 1024  # a foreign file must not make us allocate gigabytes before its shapes are compared
MAX_LAYERS = 8

Layer = tuple[Tensor, Tensor]
"""Weights `[*batch, out, in]` and biases `[*batch, out]`."""


class MLPTerms(NamedTuple):
    """The MLP of one tensor for one step.

    Attributes:
        layers: the first one on element features, their normalisation folded in, and the others.
        lines: first-layer weights `[*batch, hidden, k]` of each group of line features, likewise.
        gain: factor on the step, `[*batch]`.
    """

    layers: list[Layer]
    lines: list[Tensor]
    gain: Tensor


class FeatureMLP(Rule):
    """`delta = -gain * d * exp(exp_mult * a)`, with (d, a) from an MLP with ReLU on normalised features.

    The first layer's inputs are the element features, the line features and the constant ones, in the order that
    `slots` gives.

    Args:
        widths: inputs, hidden layers, outputs.
        seed: of the initial meta-weights: normal, std 1/sqrt(fan_in), cut at two of them; biases 0.
        bank: leading dimensions of all weights, for rules that mix several MLPs.
    """

    norm_eps: float = 1e-5
    exp_mult: float = 1e-3

    def __init__(self, widths: list[int], seed: int, bank: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not all(1 <= width <= MAX_HIDDEN for width in widths) or len(widths) > MAX_LAYERS + 2:
            raise ValueError(f"hidden widths must be from 1 to {MAX_HIDDEN}, in 1 to {MAX_LAYERS} layers, got {widths}")
        self.widths = widths
        self.temporaries = widths[0] + 2 * max(widths[1:])
        generator = make_generator(seed)
        for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            std = 1 / sqrt(fan_in)
            weight = torch.empty(*bank, fan_out, fan_in)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            self.register_parameter(f"w{i}", nn.Parameter(weight))
            self.register_parameter(f"b{i}", nn.Parameter(torch.zeros(*bank, fan_out)))

    # -- what a rule says of itself ------------------------------------------------------------------------------------

    @abstractmethod
    def element_features(self, e: Elements) -> list[features.Piece]:
        """Features of the elements, in groups `[*batch, k, *shape]`, from the new accumulators."""

    def line_features(self, acc: Mapping[str, Tensor], layout: Layout) -> list[Tensor]:
        """Features that rows or columns share, in groups `[*batch, k, *shape or 1s]`; a vector has none."""
        return []

    def constant_features(self, clock: Clock) -> Tensor | None:
        """Features that all elements share, `[*batch, k]`; not normalised."""
        return None

    @abstractmethod
    def slots(self, layout: Layout) -> tuple[list[slice], list[list[slice]], slice]:
        """The first layer's inputs that are element features, each group of line features, and constant ones."""

    def norm_axes(self, layout: Layout) -> tuple[int, ...]:
        """The axes over which features are normalised."""
        return layout.axes

    def layers(self, shared: Means) -> list[Layer]:
        """The MLP, given the tensor's terms from `decide_together`."""
        return [(getattr(self, f"w{i}"), getattr(self, f"b{i}")) for i in range(1, len(self.widths))]

    @abstractmethod
    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        """Factor on the step `[*batch]`, given the element features' mean squares `[*batch, k]`."""

    def join_features(self, e: Elements) -> tuple[Tensor, Accumulators]:
        """The element features `[*batch, k, *shape]`, and the fields that save `move` from making them again."""
        joined = features.join_pieces(self.element_features(e), e.p, e.layout.ndim)
        return joined, {"features": joined} if e.whole else {}

    # -- stages --------------------------------------------------------------------------------------------------------

    def begin_step(self, clock: Clock) -> Means:
        """The features that all elements share."""
        shared = self.constant_features(clock)
        return {} if shared is None else {"constant": shared}

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        """The first layer, with everything that is not an element's own folded in."""
        axes, ndim = self.norm_axes(layout), layout.ndim
        (weight, bias), *rest = self.layers(shared)
        own, groups, constant = self.slots(layout)
        fields: Accumulators = {}
        if "constant" in shared:
            bias = _add_product(bias[..., None], weight[..., constant], shared["constant"][..., None])[..., 0]
        lines = self.line_features(acc, layout)
        fields |= {f"lines {i}": feature for i, feature in enumerate(lines)}
        squares = [means["squares"], *(feature.square().mean(axes, keepdim=True) for feature in lines)]
        widths = [square.shape[-ndim - 1] for square in squares]
        parts = [weight[..., part] for group in (own, *groups) for part in group]
        first = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if all(square.shape[square.ndim - ndim :].numel() == 1 for square in squares):
            mean_squares = torch.cat([square.flatten(-ndim)[..., 0] for square in squares], -1)
            first = first * (mean_squares + self.norm_eps).rsqrt().unsqueeze(-2)
        else:  # the normalisation is not one number per tensor
            scales = ("scale", *(f"scale {i}" for i in range(len(groups))))
            fields |= {key: (square + self.norm_eps).rsqrt() for key, square in zip(scales, squares, strict=True)}
        weight, *line_weights = torch.split(first, widths, -1)
        gain = self.gain(means["squares"].flatten(-ndim).mean(-1), shared)
        return Decision(fields=fields, decided=MLPTerms([(weight, bias), *rest], line_weights, gain))

    def move(self, e: Elements, decided: MLPTerms) -> Visit:
        ndim, shape = e.layout.ndim, e.p.shape[e.p.ndim - e.layout.ndim :]
        x = e.acc["features"] if "features" in e.acc else self.join_features(e)[0]
        if "scale" in e.acc:
            x = x * e.acc["scale"]
        (weight, bias), *rest = decided.layers
        base = features.spread(bias, ndim)
        made = "lines 0" in e.acc
        lines = (
            [e.acc[f"lines {i}"] for i in range(len(decided.lines))] if made else self.line_features(e.acc, e.layout)
        )
        for i, (line, feature) in enumerate(zip(decided.lines, lines, strict=True)):
            feature = feature * e.acc[f"scale {i}"] if f"scale {i}" in e.acc else feature
            flat = feature.flatten(-ndim)
            product = _add_product(bias[..., None], line, flat) if i == 0 else _multiply(line, flat)
            product = product.reshape(*product.shape[:-1], *feature.shape[-ndim:])
            base = product if i == 0 else base + product
        x = x.flatten(-ndim)
        if mlp_autograd.can_run(x, base, weight, rest):
            spread = base.shape[-ndim:].numel() == 1  # the kernel does it
            base = base if spread else base.expand(*base.shape[:-ndim], *shape)
            hidden = mlp_autograd.run_mlp(x, base.flatten(-ndim), weight, rest)
        else:
            hidden = _run_layers(x, base.expand(*base.shape[:-ndim], *shape).flatten(-ndim), decided)
        step = hidden[..., 0, :]
        if self.exp_mult:
            step = step * torch.exp(self.exp_mult * hidden[..., 1, :])
        return Visit(delta=(step * -decided.gain[..., None]).reshape(e.p.shape))


def _run_layers(x: Tensor, base: Tensor, terms: MLPTerms) -> Tensor:
    """`[*batch, k, N]` and what the first layer adds, `[*batch, hidden, N]` -> outputs `[*batch, out, N]`."""
    (weight, _), *rest = terms.layers
    if terms.lines and not torch.is_grad_enabled() and weight.ndim == x.ndim == 2:
        hidden = base.addmm_(weight, x)  # the sum of the line terms is ours
    else:
        hidden = _add_product(base, weight, x)
    for weight, bias in rest:
        hidden = _add_product(bias[..., None], weight, hidden.relu_())
    return hidden


def _multiply(weight: Tensor, x: Tensor) -> Tensor:
    """`weight @ x`, `[*batch, out, in]` times `[*batch, in, N]`."""
    return torch.bmm(weight.expand(len(x), *weight.shape[-2:]), x) if x.ndim == 3 else weight @ x


def _add_product(base: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """`base + weight @ x`."""
    if is_traced():  # the sum is fused with what follows
        return base + _multiply(weight, x)
    if weight.ndim == 2 and x.ndim == 2:
        return torch.addmm(base, weight, x)
    if x.ndim == 3:  # also with shared weights, which `matmul` would transpose all of x for
        return torch.baddbmm(base, weight.expand(len(x), *weight.shape[-2:]), x)
    return base + weight @ x
