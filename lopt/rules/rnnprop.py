"""RNNprop: the coordinatewise LSTM on Adam's normalised gradient and momentum, with a bounded step.

Source: Lv, Jiang & Li 2017, arXiv 1703.03633, section 4.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.random import derive_seeds, make_generator
from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.lstm import STATE, CoordinatewiseLSTM
from lopt.rules.stages import Accumulators

EPS = 1e-8


class RNNprop(CoordinatewiseLSTM):
    """Inputs m_hat and g_hat (divided by sqrt(v_hat)), dense ELU layer, two LSTM layers, `output_scale * tanh`.

    Made to generalise over scales of gradients and to longer runs than those of its training. State: the LSTM's four
    vectors of `hidden` numbers and two moments per parameter.

    Args:
        hidden: width of the dense layer and of both LSTM layers.
        beta1, beta2: decays of the moments (0.95 in the paper).
        output_scale: largest step of a coordinate (0.1 in the paper).
        seed: of the initial meta-weights.
    """

    name = "rnnprop"
    square_keys = ("v",)
    quick_config: ClassVar = {"hidden": 8}
    feature_names = ("m / sqrt(v)", "g / sqrt(v)")
    compact_keys: tuple[str, ...] = (*STATE, "m", "v")

    def __init__(
        self,
        hidden: int = 20,
        beta1: float = 0.95,
        beta2: float = 0.95,
        output_scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(hidden, hidden, seed)
        self.beta1, self.beta2, self.output_scale = beta1, beta2, output_scale
        generator = make_generator(derive_seeds(seed, "rnnprop input layer"))
        bound = 1 / sqrt(2)
        self.w_in = nn.Parameter((torch.rand(hidden, 2, generator=generator, dtype=torch.float32) * 2 - 1) * bound)
        self.b_in = nn.Parameter(torch.zeros(hidden, dtype=torch.float32))

    def init_flat(self, p: Tensor) -> Accumulators:
        moments = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        return super().init_flat(p) | moments

    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        m = self.beta1 * acc["m"] + (1 - self.beta1) * g
        v = self.beta2 * acc["v"] + (1 - self.beta2) * g * g
        scale = safe_sqrt(v / (1 - self.beta2 ** (step + 1))) + EPS
        # Divided by the root of the second moment both inputs are of order 1, whatever the scale of gradients.
        inputs = torch.stack([m / (1 - self.beta1 ** (step + 1)) / scale, g / scale], dim=-2)
        w_in = self.w_in.expand(*inputs.shape[:-2], *self.w_in.shape[-2:])
        x = F.elu(w_in @ inputs + self.b_in[..., None])
        out, vectors = self.run_lstm(x, acc)
        return self.output_scale * torch.tanh(out), vectors | {"m": m, "v": v}
