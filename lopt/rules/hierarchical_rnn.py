"""The hierarchical RNN: a GRU per element, one per tensor and one for the model, each steering the level below.

Source: Wichrowska et al. 2017, arXiv 1703.04813, and its published code with the settings of its meta-training.
Differs from the source: the tensors' GRU and the model's step at the beginning of the next step instead of the end of
this one, which is the same; the model's GRU sees the mean over all tensors (the published code: the last tensor only);
the initial rate is learned, not drawn anew for every element, so that a rule has no randomness; each level has one bias
(the code: up to three that add up); the direction is first read from the hidden state ten times more weakly, so that an
untrained rule follows the momenta; no attention (gradients at another point than the parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lopt.core.random import make_generator
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, Sum, Visit

MAX_HIDDEN = 1024  # a foreign file must not make us allocate gigabytes before its shapes are compared
MAX_SCALES = 16
MAX_LOG_RATE = 33.0
SCALE = 0.5  # of all initial weights: standard deviation times sqrt(fan_in)
GATE_BIAS = 2.2  # sigmoid: 0.9
INPUT_DECAY_BIAS = 2.2
SCALE_DECAY_BIAS = 3.2  # sigmoid: 0.96
RATE_MOMENTUM = 3.2


class HierarchicalRNN(Rule):
    """`p <- p - exp(r) d / rms(d)`: direction d and rate r of each element come from its GRU's hidden state.

    Inputs of an element's GRU: averages of its gradient at `num_scales` time scales, each twice the one before,
    divided by their own root mean squares and squashed by asinh; products of neighbours among them; the logarithms of
    the mean squares, against their mean; the logarithm of its rate, against the mean over the model. The shortest time
    scale, that of the mean squares, and the change of the rate are read from the hidden state, too.

    The GRU of a tensor sees the mean of its elements' hidden states and inputs, the model's the mean of the tensors'
    hidden states. Hidden states of a higher level are added, projected, to the biases of the levels below.

    Args:
        hidden: size of an element's hidden state (10 in the source).
        tensor_hidden, global_hidden: likewise of a tensor's and of the model's (20 and 20).
        num_scales: number of time scales (4).
        lr: initial rate, learned as a logarithm (the source draws from 1e-6 to 1e-2).
        seed: of the initial meta-weights.
    """

    name = "hierarchical_rnn"
    square_keys = ("v",)
    quick_config: ClassVar = {"hidden": 6, "tensor_hidden": 6, "global_hidden": 6}
    tensor_keys = ("pooled", "tensor", "global")
    shares: Tensor
    w_2to1: Tensor
    w_3to1: Tensor
    w_3to2: Tensor
    start1: Tensor
    start2: Tensor
    start3: Tensor

    def __init__(
        self,
        hidden: int = 10,
        tensor_hidden: int = 20,
        global_hidden: int = 20,
        num_scales: int = 4,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        sizes = {"hidden": hidden, "tensor_hidden": tensor_hidden, "global_hidden": global_hidden}
        super().__init__()
        for key, size in sizes.items():
            if not 1 <= size <= MAX_HIDDEN:
                raise ValueError(f"{key} must be from 1 to {MAX_HIDDEN}, got {size}")
        if not 1 <= num_scales <= MAX_SCALES:
            raise ValueError(f"num_scales must be from 1 to {MAX_SCALES}, got {num_scales}")
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        self.num_scales = num_scales
        scales = range(1, num_scales + 1)
        self.feature_names = (
            *(f"asinh(m_{i} / rms)" for i in scales),
            *(f"product of {i} and {i + 1}" for i in scales[:-1]),
            *(f"log v_{i} - mean" for i in scales),
            "log rate - mean",
        )
        inputs = 3 * num_scales
        self.sizes = {"pooled": hidden + inputs, "tensor": tensor_hidden, "global": global_hidden}
        self.hidden = hidden
        self.temporaries = 2 * inputs + 8 * hidden
        self._draw_weights(inputs, seed, lr)
        self.register_buffer("shares", 0.5 ** torch.arange(num_scales, dtype=torch.float32), persistent=False)

    def _draw_weights(self, inputs: int, seed: int, lr: float) -> None:
        """Meta-weights as the source starts them; levels are 1 (element), 2 (tensor), 3 (model)."""
        generator = make_generator(seed)

        def normal(rows: int, columns: int, fan_in: int, scale: float = SCALE) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(rows, columns, generator=generator, dtype=torch.float32) * (scale / sqrt(fan_in))
            )

        above: list[tuple[int, int]] = []
        pooled, tensor, model = self.sizes["pooled"], self.sizes["tensor"], self.sizes["global"]
        for level, width, size in ((3, tensor, model), (2, pooled, tensor), (1, inputs, self.hidden)):
            bias = torch.zeros(3 * size, dtype=torch.float32)
            bias[: 2 * size] = GATE_BIAS
            start = 2 * torch.rand(size, generator=generator, dtype=torch.float32) - 1
            for key, value in {"b": nn.Parameter(bias), "start": nn.Parameter(start)}.items():
                self.register_parameter(f"{key}{level}", value)
            self.register_parameter(f"w_x{level}", normal(3 * size, width, width + size))
            self.register_parameter(f"w_h{level}", normal(3 * size, size, width + size))
            for upper, upper_size in above:
                self.register_parameter(f"w_{upper}to{level}", normal(3 * size, upper_size, upper_size))
            above.append((level, size))
        self.w_direction = normal(1, self.hidden, self.hidden, SCALE / 10)
        self.w_shortcut = nn.Parameter(torch.full((1, self.num_scales), 1 / self.num_scales, dtype=torch.float32))
        self.w_rate = nn.Parameter(torch.zeros(1, self.hidden, dtype=torch.float32))
        self.b_rate = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.w_decays = normal(2, self.hidden, self.hidden)
        self.b_decays = nn.Parameter(torch.tensor([INPUT_DECAY_BIAS, SCALE_DECAY_BIAS], dtype=torch.float32))
        self.rate_momentum = nn.Parameter(torch.tensor(RATE_MOMENTUM, dtype=torch.float32))
        self.log_lr = nn.Parameter(torch.tensor(log(lr), dtype=torch.float32))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        ndim = layout.ndim
        batch = p.shape[: p.ndim - ndim]
        return {
            "hidden": features.start_averages(p, self.hidden, ndim),
            "m": features.start_averages(p, self.num_scales, ndim),
            "v": features.start_averages(p, self.num_scales, ndim),
            "log_rate": torch.zeros_like(p),
            **{key: p.new_zeros(*batch, size) for key, size in self.sizes.items()},
        }

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        axes = e.layout.axes
        return Visit(sums={"log_rate": Sum(e.acc["log_rate"].sum(axes, keepdim=True), axes)})

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        """The two upper levels take in what the last step pooled.

        A tensor at its first step starts from the learned initial values and has nothing to tell yet.
        """
        tensor_state, means, layouts, _, clock = tensors
        pooled = tensor_state["pooled"]
        rates = [m["log_rate"].flatten(-x.ndim)[..., 0] for m, x in zip(means, layouts, strict=True)]  # [*batch, count]
        counts = torch.cat([torch.full_like(r, prod(x.shape)) for r, x in zip(rates, layouts, strict=True)], -1)
        started = (clock.step > 0).expand(pooled.shape[:-1])
        heard = (started & (counts > 0))[..., None]  # [*batch, n, 1]
        some = heard.any(-2, keepdim=True)  # [*batch, 1, 1]
        first_tensor, first_model = self.start2.unsqueeze(-2), self.start3.unsqueeze(-2)

        # A tensor's GRU takes in what its elements pooled, then the model's takes in what the tensors' have become.
        tensor = torch.where(started[..., None], tensor_state["tensor"], first_tensor)
        model = torch.where(some, _mean(tensor_state["global"], heard), first_model)
        informed = self._cell(2, pooled.mT, tensor.mT, _project(self.w_3to2, model).mT).mT
        tensor = torch.where(started[..., None], informed, tensor)
        informed = self._cell(3, _mean(tensor, heard).mT, model.mT, None).mT
        model = torch.where(some, informed, model)

        # The mean over all elements of the model, so tensors count by their size.
        log_rate = (torch.cat(rates, -1) * counts).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
        shared = {
            "bias": _project(self.w_2to1, tensor) + _project(self.w_3to1, model),
            "start": torch.where(started[..., None], 0.0, self.start1.unsqueeze(-2)),
            "started": started.to(pooled.dtype),
            "log_rate": log_rate.expand(pooled.shape[:-1]),
        }
        return {"tensor": tensor, "global": model.expand_as(tensor_state["global"])}, shared

    def update_state(self, e: Elements, shared: Means) -> Visit:
        ndim, shape = e.layout.ndim, e.p.shape
        h, m, v = (e.acc[key].flatten(-ndim) for key in ("hidden", "m", "v"))  # [*batch, k, N]
        # State starts at 0; the learned initial vector is added in the first step, and 0 in all later ones.
        h = h + shared["start"][..., None]
        started = shared["started"][..., None, None]
        # A tensor's first decays are 0: averages begin at its first gradient, and need no bias correction.
        # The root of a decay has twice its time scale, so that one number per element gives all the scales.
        log_decays = logsigmoid(self.w_decays @ h + self.b_decays[..., None])
        decays = started * torch.exp(log_decays[..., :1, :] * self.shares[:, None])
        m = features.average(m, features.lift(e.g, ndim).flatten(-ndim), decays)
        v = features.average(v, m.square() + 1e-12, started * log_decays[..., 1:, :].exp())
        # Gradients enter by their direction and by ratios of scales only: inputs do not depend on the loss's unit.
        scaled, log_v = _scale(m, v), (v + 1e-16).log()
        log_rate = features.lift(e.acc["log_rate"], ndim).flatten(-ndim) - shared["log_rate"][..., None, None]
        products = scaled[..., 1:, :] * scaled[..., :-1, :]
        x = torch.cat([scaled, products, log_v - log_v.mean(-2, keepdim=True), log_rate], -2)
        # What the two upper levels have to say is a bias on this level's gates.
        h = self._cell(1, x, h, shared["bias"][..., None])
        pooled = torch.cat([h, x], -2).sum(-1)
        squares = self._direction(h, scaled).square().sum(-1)
        sums = {"pooled": pooled, "squares": squares}
        return Visit(
            {key: a.reshape(e.acc[key].shape) for key, a in {"hidden": h, "m": m, "v": v}.items()},
            {key: Sum(features.spread(a, len(shape[-ndim:])), e.layout.axes) for key, a in sums.items()},
        )

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        pooled, squares = (means[key].flatten(-layout.ndim)[..., 0] for key in ("pooled", "squares"))
        return Decision({"pooled": pooled}, decided=(squares + 1e-16).rsqrt())

    def move(self, e: Elements, decided: Tensor) -> Visit:
        ndim = e.layout.ndim
        h, m, v = (e.acc[key].flatten(-ndim) for key in ("hidden", "m", "v"))
        old, lr = e.acc["log_rate"].flatten(-ndim), self.log_lr[..., None]
        # The state is relative to the learned lr: it starts at 0, and follows where meta-training moves lr.
        change = (self.w_rate @ h)[..., 0, :] + self.b_rate
        log_rate = _limit(lr + old + change)
        kept = features.average(old, log_rate - lr, torch.sigmoid(self.rate_momentum)[..., None])
        step = log_rate.exp() * decided[..., None] * self._direction(h, _scale(m, v))
        return Visit({"log_rate": kept.reshape(e.p.shape)}, delta=-step.reshape(e.p.shape))

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _direction(self, h: Tensor, scaled: Tensor) -> Tensor:
        """Direction `[*batch, N]`: read from the hidden state, plus a shortcut from the scaled averages."""
        return (self.w_direction @ h + self.w_shortcut @ scaled)[..., 0, :]

    def _cell(self, level: int, x: Tensor, h: Tensor, bias: Tensor | None) -> Tensor:
        """One GRU step, feature-major: x `[*batch, in, N]`, h `[*batch, H, N]`, bias from above `[*batch, 3 H, 1]`."""
        w_x, w_h, level_bias = (getattr(self, f"{key}{level}") for key in ("w_x", "w_h", "b"))
        size = 2 * h.shape[-2]
        base = w_x @ x + (level_bias[..., None] if bias is None else level_bias[..., None] + bias)
        reset, keep = torch.sigmoid(base[..., :size, :] + w_h[..., :size, :] @ h).chunk(2, -2)
        candidate = torch.tanh(base[..., size:, :] + w_h[..., size:, :] @ (reset * h))
        return torch.lerp(candidate, h, keep)


def _scale(m: Tensor, v: Tensor) -> Tensor:
    """Averages over their root mean squares, squashed."""
    return torch.asinh(m * (v + 1e-16).rsqrt())


def _project(weight: Tensor, rows: Tensor) -> Tensor:
    """`[*batch, n, in]` -> `[*batch, n, out]`."""
    return rows @ weight.mT


def _mean(rows: Tensor, heard: Tensor) -> Tensor:
    """Mean `[*batch, 1, k]` over the rows `[*batch, n, k]` that are heard."""
    return torch.where(heard, rows, 0.0).sum(-2, keepdim=True) / heard.sum(-2, keepdim=True).clamp(min=1)


def _limit(log_rate: Tensor) -> Tensor:
    """At most `MAX_LOG_RATE` in size; the derivative is 1 beyond, too, so that a rule can come back."""
    return log_rate + (log_rate.clamp(-MAX_LOG_RATE, MAX_LOG_RATE) - log_rate).detach()
