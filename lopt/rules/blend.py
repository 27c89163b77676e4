"""Blend: normalised momenta, in part preconditioned and orthogonalised; a controller of 128 numbers says how much.

A strong prior with few meta-weights, so that evolution strategies on whole runs can train it in minutes. Its parts are
known: steps relative to a tensor's size (LAMB, You et al. 2020, arXiv 1904.00962), partial adaptivity (Padam, Chen et
al. 2018, arXiv 1806.06763), orthogonalised momentum (Muon, Jordan et al. 2024), linear decay over the planned steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log10, prod, sqrt
from typing import NamedTuple

import torch
from lopt_kernels.feature_mlp.newton_schulz import orthogonalize
from torch import Tensor, nn

from lopt.core.random import make_generator
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.scheduler import LOSS_KEYS
from lopt.rules.layout import Layout
from lopt.rules.stages import (
    Accumulators,
    AllTensors,
    Clock,
    Decision,
    Elements,
    Finished,
    Means,
    Sum,
    Visit,
    count_elements,
)

MAX_HIDDEN = 1024  # a foreign file must not make us allocate gigabytes before its shapes are compared
MOMENTA = (0.9, 0.99)
SECOND = 0.99
COSINES = 0.9
TINY = 1e-18  # added to mean squares: what is below counts as 0, and derivatives stay finite there
LARGEST = 1e12  # of gradients, so that means of their squares stay finite
LEAST_RELATIVE = 1e-6  # second moment, of the mean one: an element that is still moves at most 1000 times as far
SMALLEST_NORM = 1e-6  # of a step before it is brought to its size
SMALLEST_SCALE = 0.02  # of tensors that start at 0
PRIOR = (0.0, 0.0, 2.0, 2.0)  # of the outputs: step 1, orthogonalised by half, fast momentum, Adam's preconditioner
FEATURES = (
    "t/T",
    "log T",
    "log initial rms",
    "is a vector",
    "log size",
    "cos(g, m fast)",
    "cos(g, m slow)",
    "cos(m fast, m slow)",
    "log growth",
    "log signal to noise",
    "loss over short minimum",
    "loss over middle minimum",
    "loss over long minimum",
)


class BlendDecision(NamedTuple):
    """What a tensor's step is made of, all `[*batch]` but `inverse`, `[*batch, 1s]`.

    Attributes:
        step: its root mean square.
        orthogonal: the orthogonalised step's share.
        momenta: weights of the momenta in the step, `[*batch, 1, 2]`.
        exponent: of the relative second moment, -0.5 for Adam's preconditioner.
        inverse: of the mean second moment.
    """

    step: Tensor
    orthogonal: Tensor
    momenta: Tensor
    exponent: Tensor
    inverse: Tensor


class Blend(Rule):
    """`p <- p - s ((1 - w) u + w orth(u))` with `u = (a m_fast + (1 - a) m_slow) / v^(q/2)` and both terms of rms 1.

    The size is `s = lr rms(p_0) (1 - t/T) exp(c)`. The controller, a layer of tanh with a linear bypass, reads features
    of each tensor (`feature_names`) and says c, w, a and q. Vectors have no orth. At or beyond the planned number of
    steps T nothing moves.

    Args:
        hidden: units of the controller.
        lr: size of the first step relative to the initial parameters.
        seed: of the initial meta-weights.
    """

    name = "blend"
    square_keys = ("v",)
    needs_loss = True
    needs_num_steps = True
    tensor_keys = ("scale", "cosines", *LOSS_KEYS)
    temporaries = 8
    feature_names = FEATURES
    momentum_decays: Tensor

    def __init__(self, hidden: int = 4, lr: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= hidden <= MAX_HIDDEN:
            raise ValueError(f"hidden must be from 1 to {MAX_HIDDEN}, got {hidden}")
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        self.lr = lr
        generator, inputs, outputs = make_generator(seed), len(FEATURES), len(PRIOR)
        self.w_in = nn.Parameter(torch.randn(hidden, inputs, generator=generator, dtype=torch.float32) / sqrt(inputs))
        self.b_in = nn.Parameter(torch.zeros(hidden, dtype=torch.float32))
        # Small, and not 0: with the output at its prior, w_in has a gradient all the same.
        self.w_out = nn.Parameter(torch.randn(outputs, hidden, generator=generator, dtype=torch.float32) / 100)
        self.w_bypass = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float32))
        self.b_out = nn.Parameter(torch.tensor(PRIOR, dtype=torch.float32))
        self.register_buffer("momentum_decays", torch.tensor(MOMENTA, dtype=torch.float32), persistent=False)

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        batch = p.shape[: p.ndim - layout.ndim]
        return {
            "m": features.start_averages(p, len(MOMENTA), layout.ndim),
            "v": torch.zeros_like(p),
            "scale": p.new_zeros(*batch, 1),
            "cosines": p.new_zeros(*batch, 3),
            **features.start_loss_buffer(batch, p),
        }

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        ndim, axes = e.layout.ndim, e.layout.axes
        rows = torch.cat([features.lift(_clip(e.g), ndim), features.lift(e.p, ndim), e.acc["m"]], -ndim - 1)
        rows = rows.flatten(-ndim)
        # One product of g, p and the momenta with themselves has all norms and cosines; chunks of it can be added up.
        products = features.spread((rows @ rows.mT).flatten(-2), ndim)
        return Visit(sums={"products": Sum(products, axes), "power": Sum(e.acc["v"].sum(axes, keepdim=True), axes)})

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        tensor_state, means, layouts, loss, clock = tensors
        assert clock.num_steps is not None
        scale = tensor_state["scale"]  # [*batch, n, 1]
        # Groups of equal tensors come as [*batch, count, ...]; joined, every tensor is a row of the controller's input.
        products = torch.cat(
            [m["products"].flatten(-x.ndim)[..., 0] for m, x in zip(means, layouts, strict=True)], scale.ndim - 2
        )
        power = torch.cat([m["power"].flatten(-x.ndim) for m, x in zip(means, layouts, strict=True)], scale.ndim - 2)
        begins = (clock.step == 0)[..., None]
        gram = products.reshape(*products.shape[:-1], 4, 4)
        squares = gram.diagonal(dim1=-2, dim2=-1)
        size = (squares[..., 1:2] + TINY).sqrt()
        decays = features.loss_decays(clock.num_steps, scale.dtype)
        buffer = features.update_loss_buffer({key: tensor_state[key] for key in LOSS_KEYS}, loss, decays)
        new = {
            "scale": torch.where(begins, size.clamp(min=SMALLEST_SCALE), scale),
            "cosines": torch.lerp(_find_cosines(gram, squares), tensor_state["cosines"], COSINES),
            **buffer,
        }
        # Features are of order 1, so that one initial scale of the weights suits all of them.
        progress = clock.progress(scale.dtype)
        assert progress is not None
        decay = (1 - progress).clamp(min=0)
        x = torch.cat(
            [
                _expand(progress.clamp(max=1), scale),
                _expand((clock.num_steps.to(scale.dtype) / 300).log10(), scale),
                (10 * new["scale"]).log10(),
                self._describe_shapes(means, layouts, scale),
                new["cosines"],
                _log_ratio(size, new["scale"]),
                torch.where(begins, 0.0, _log_ratio(squares[..., 2:3], power) / 4),
                features.loss_features(buffer, decays)[..., 2::3],  # over few steps, some, the whole run
            ],
            -1,
        )
        # One hidden layer and a linear bypass; sigmoids keep shares in (0, 1), and the size is bounded by the clamp.
        hidden = torch.tanh(x @ self.w_in.mT + self.b_in.unsqueeze(-2))
        out = hidden @ self.w_out.mT + x @ self.w_bypass.mT + self.b_out.unsqueeze(-2)
        strength, *shares = out.unbind(-1)
        orthogonal, fast, adapt = torch.sigmoid(torch.stack(shares)).unbind()
        correction = 1 - self.momentum_decays ** (clock.step + 1)[..., None]
        # The sign and the bias correction are in the weights of the momenta, by which elements are multiplied anyway.
        return new, {
            "step": self.lr * new["scale"][..., 0] * decay * torch.exp(strength.clamp(-5, 5)),
            "orthogonal": orthogonal,
            "momenta": torch.stack([-fast, fast - 1], -1) / correction,
            "exponent": -0.5 * adapt,
        }

    @staticmethod
    def _describe_shapes(means: Sequence[Means], layouts: Sequence[Layout], like: Tensor) -> Tensor:
        """Whether a tensor is a vector, and the logarithm of its size: `[*batch, n, 2]`."""
        flags, sizes = [], []
        for group_means, layout in zip(means, layouts, strict=True):
            count = group_means["power"].shape[like.ndim - 2]
            flags.append(like.new_full((count,), float(layout.factored is None)))
            sizes.append(like.new_full((count,), log10(max(1, prod(layout.shape))) / 3 - 1))
        return torch.stack([torch.cat(flags), torch.cat(sizes)], -1).expand(*like.shape[:-1], 2)

    def update_state(self, e: Elements, shared: Means) -> Visit:
        ndim, g = e.layout.ndim, _clip(e.g)
        acc = {
            "m": features.average(e.acc["m"], features.lift(g, ndim), features.spread(self.momentum_decays, ndim)),
            "v": torch.lerp(g.square(), e.acc["v"], SECOND),
        }
        # Summed a second time: `measure` saw the old v, and `move` divides by the mean of the new one.
        return Visit(acc, {"power": Sum(acc["v"].sum(e.layout.axes, keepdim=True), e.layout.axes)})

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        # Relative to the tensor's own mean second moment a step is of size 1 whatever the gradient's scale.
        inverse = (means["power"] + TINY).reciprocal()
        momenta = (shared["momenta"] * inverse.flatten(-layout.ndim).sqrt()).unsqueeze(-2)
        return Decision(
            decided=BlendDecision(shared["step"], shared["orthogonal"], momenta, shared["exponent"], inverse)
        )

    def move(self, e: Elements, decided: BlendDecision) -> Visit:
        ndim = e.layout.ndim
        m = (decided.momenta @ e.acc["m"].flatten(-ndim)).reshape(e.p.shape)
        relative = e.acc["v"] * decided.inverse + LEAST_RELATIVE
        return Visit(delta=m * relative ** features.spread(decided.exponent, ndim))

    def finish(self, delta: Tensor, read: Callable[[], Elements], decided: BlendDecision, layout: Layout) -> Finished:
        inverse, step = _find_inverse_rms(delta, layout), features.spread(decided.step, layout.ndim)
        if layout.factored is None:
            # A factor instead of a scaled step: the caller multiplies where it writes.
            return Finished(delta, inverse * step)
        # Both terms get rms 1 before they are mixed: the share then says how much of each there is.
        matrix = orthogonalize(delta.movedim(layout.last, (-2, -1))).movedim((-2, -1), layout.last)
        shares = features.spread(decided.orthogonal, layout.ndim)
        return Finished(torch.lerp(delta * inverse, matrix * _find_inverse_rms(matrix, layout), shares), step)


def _clip(g: Tensor) -> Tensor:
    return g.clamp(-LARGEST, LARGEST)


def _expand(x: Tensor, like: Tensor) -> Tensor:
    """`[*batch, 1 or n]` -> `[*batch, n, 1]`."""
    return x[..., None].expand_as(like)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    """Half the logarithm of the ratio of two tensors of one shape, at most 3 either way."""
    return ((above + 1e-12) / (below + 1e-12)).log().clamp(-6, 6) / 2


def _find_cosines(gram: Tensor, squares: Tensor) -> Tensor:
    """Between g and the two momenta, and between these: `[..., 3]` of products `[..., 4, 4]`."""
    pairs = ((0, 2), (0, 3), (2, 3))
    products = torch.stack([gram[..., i, j] for i, j in pairs], -1)
    inverse = (squares + TINY).rsqrt()
    return products * torch.stack([inverse[..., i] * inverse[..., j] for i, j in pairs], -1)


def _find_inverse_rms(x: Tensor, layout: Layout) -> Tensor:
    """One over the root mean square of a whole tensor, `[*batch, 1s]`."""
    norm = torch.linalg.vector_norm(x, dim=layout.axes, keepdim=True)
    inverse: Tensor = sqrt(count_elements(layout.axes, layout)) / (norm + SMALLEST_NORM)
    return inverse
