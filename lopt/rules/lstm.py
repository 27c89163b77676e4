"""The coordinatewise LSTM optimizer: every parameter runs the same small recurrent network on its own gradient.

Source: Andrychowicz et al. 2016, arXiv 1606.04474, and its published code (preprocessing with k = 5).
Differs from the source: the forget bias of 1 is part of the bias's initial value.
"""

from __future__ import annotations

from math import exp, sqrt
from typing import ClassVar

import torch
from lopt_kernels.differentiable import lstm as lstm_autograd
from lopt_kernels.elementwise import lstm_layers
from lopt_kernels.elementwise.lstm_layers import LSTMWeights
from torch import Tensor, nn

from lopt.core.random import make_generator
from lopt.rules.building_blocks.elementwise import ElementwiseRule
from lopt.rules.stages import Accumulators

MAX_HIDDEN = 1024  # a foreign file must not make us allocate gigabytes before its shapes are compared
STATE = ("h1", "c1", "h2", "c2")


class CoordinatewiseLSTM(ElementwiseRule):
    """Shared core of the recurrent rules: features `[*batch, F, N]` -> two LSTM layers -> one number each.

    Args:
        num_features: F.
        hidden: width of both layers.
        seed: of the initial meta-weights, U(-1/sqrt(hidden), 1/sqrt(hidden)) as torch.nn.LSTM; the output layer
            starts ten times smaller, so that an untrained rule hardly moves.
    """

    compact_keys: tuple[str, ...] = STATE

    def __init__(self, num_features: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.config = {"hidden": hidden, "seed": seed} | self.config  # rule files have this order
        if not 1 <= hidden <= MAX_HIDDEN:
            raise ValueError(f"hidden must be from 1 to {MAX_HIDDEN}, got {hidden}")
        self.hidden = hidden
        generator = make_generator(seed)

        def uniform(*shape: int, bound: float = 1 / sqrt(hidden)) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)

        self.w_ih1 = uniform(4 * hidden, num_features)
        self.w_hh1 = uniform(4 * hidden, hidden)
        self.b1 = uniform(4 * hidden)
        self.w_ih2 = uniform(4 * hidden, hidden)
        self.w_hh2 = uniform(4 * hidden, hidden)
        self.b2 = uniform(4 * hidden)
        self.w_out = uniform(1, hidden, bound=0.1 / sqrt(hidden))
        self.b_out = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        # A forget bias of 1, so that cells remember before they are trained.
        with torch.no_grad():
            for bias in (self.b1, self.b2):
                bias[hidden : 2 * hidden] += 1.0

    def init_flat(self, p: Tensor) -> Accumulators:
        zeros = torch.zeros_like(p).unsqueeze(-2)
        return {key: zeros.repeat_interleave(self.hidden, -2) for key in STATE}

    def run_lstm(self, x: Tensor, acc: Accumulators) -> tuple[Tensor, Accumulators]:
        """Both layers and the output layer: `[*batch, F, N]` -> `[*batch, N]` and the new vectors."""
        weights = LSTMWeights(*(getattr(self, name) for name in LSTMWeights._fields))
        h1, c1, h2, c2 = (acc[key] for key in STATE)
        # The kernel has its own backward pass; the reference is the definition, and serves everywhere else.
        vectors = (h1, c1, h2, c2)
        run = lstm_autograd.run_lstm if lstm_autograd.can_run(x, vectors, weights) else lstm_layers.reference
        out, state = run(x, vectors, weights)
        return out, dict(zip(STATE, state, strict=True))


class LSTM(CoordinatewiseLSTM):
    """The paper's rule: log/sign preprocessing (its appendix A), two LSTM layers, output times `output_scale`.

    The choice where long memory per coordinate is worth its price; it sees neither tensors nor the time. State: four
    vectors of `hidden` numbers per parameter, which may be kept in bfloat16.

    Args:
        hidden: width of both layers (20 in the paper: 5,141 meta-weights, 320 bytes of state per parameter).
        output_scale: factor on the output (0.01 in the published code).
        log_bound: k of the preprocessing; gradients below e^-k are passed on linearly.
        seed: of the initial meta-weights.
    """

    name = "lstm"
    quick_config: ClassVar = {"hidden": 8, "output_scale": 0.1}
    feature_names = ("log|g| / k", "g e^k, clipped")

    def __init__(self, hidden: int = 20, output_scale: float = 0.01, log_bound: float = 5.0, seed: int = 0) -> None:
        super().__init__(2, hidden, seed)
        self.output_scale = output_scale
        self.log_bound = log_bound

    def preprocess(self, g: Tensor) -> Tensor:
        """`[max(log(|g| + eps) / k, -1), clip(g e^k, -1, 1)]`: `[*batch, N]` -> `[*batch, 2, N]`."""
        eps = torch.finfo(g.dtype).eps
        magnitude = ((g.abs() + eps).log() / self.log_bound).clamp(min=-1)
        sign = (g * exp(self.log_bound)).clamp(-1, 1)
        return torch.stack([magnitude, sign], dim=-2)

    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        out, acc = self.run_lstm(self.preprocess(g), acc)
        return self.output_scale * out, acc
