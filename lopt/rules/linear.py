"""The smallest useful learned rule: the step is a learned linear combination of momenta.

Twelve meta-weights, readable as they are: which memory, normalised or not, with which weight and which decay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lopt.rules.building_blocks.elementwise import ElementwiseRule, safe_sqrt
from lopt.rules.stages import Accumulators

EPS = 1e-8


class Linear(ElementwiseRule):
    """`p <- p - weights . [g, m_1..m_k, g/rms, m_1/rms .. m_k/rms]`, bias-corrected momenta and second moment.

    Use it to see whether a training set-up works at all: it trains in minutes and its weights can be read. State: one
    number per momentum and one for the second moment.

    Args:
        decays: initial momentum decays b_1..b_k; learned as logits.
        second_decay: initial decay of the second moment; learned as a logit.
        lr: initial weight of the middle normalised momentum; all others start at 0, so it starts as Adam.
    """

    name = "linear"
    square_keys = ("v",)

    def __init__(
        self,
        decays: tuple[float, ...] = (0.5, 0.9, 0.99),
        second_decay: float = 0.99,
        lr: float = 0.01,
    ) -> None:
        super().__init__()
        k = len(decays)
        raw = ("g", *(f"m_{i}" for i in range(1, k + 1)))
        self.feature_names = (*raw, *(f"{name} / rms" for name in raw))
        weights = torch.zeros(2 * (k + 1), dtype=torch.float32)
        weights[k + 2 + k // 2] = lr
        self.weights = nn.Parameter(weights)
        self.decay_logits = nn.Parameter(torch.logit(torch.tensor(decays, dtype=torch.float32)))
        self.second_decay_logit = nn.Parameter(torch.logit(torch.tensor([second_decay], dtype=torch.float32)))

    def init_flat(self, p: Tensor) -> Accumulators:
        k = self.decay_logits.shape[-1]
        zeros = torch.zeros_like(p)
        return {"m": zeros.unsqueeze(-2).repeat_interleave(k, -2), "v": zeros}

    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        decay = torch.sigmoid(self.decay_logits)[..., None]
        second = torch.sigmoid(self.second_decay_logit)
        m = decay * acc["m"] + (1 - decay) * g.unsqueeze(-2)
        v = second * acc["v"] + (1 - second) * g * g
        count = step + 1
        m_hat = m / (1 - decay ** count[..., None])
        inverse_rms = 1 / (safe_sqrt(v / (1 - second**count)) + EPS)
        # Each memory twice: as it is, and over the root of the second moment, as Adam has it.
        raw = torch.cat([g.unsqueeze(-2), m_hat], dim=-2)
        features = torch.cat([raw, raw * inverse_rms.unsqueeze(-2)], dim=-2)
        delta = -(self.weights[..., None] * features).sum(-2)
        return delta, {"m": m, "v": v}
