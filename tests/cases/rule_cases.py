"""Rules as tests build them, and one that no registry has, for what the registered ones leave untried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lopt.rules import RULES, Accumulators, Clock, Means, Rule, TensorRule


def make_quick(name: str, **options: Any) -> Rule:
    """A rule in its quick configuration, but for these options."""
    return RULES[name](**{**RULES[name].quick_config, **options})


class SizedMomenta(TensorRule):
    """Two momenta mixed by their rms; the step's size is a learned scale times the tensor's rms to a learned power."""

    name = "sized_momenta"

    def __init__(self, scale: float = 0.05, power: float = 0.5) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.power = nn.Parameter(torch.tensor(power))
        self.shares = nn.Parameter(torch.tensor([0.7, 0.4]))
        self.decay_logits = nn.Parameter(torch.tensor([1.0, 3.0]))

    def init_flat(self, p: Tensor) -> Accumulators:
        return {
            "m": torch.zeros_like(p).unsqueeze(-2).repeat_interleave(2, -2),
            "product": p.new_ones(*p.shape[:-1], 1),
        }

    def statistics(self, g: Tensor, p: Tensor, acc: Accumulators) -> Mapping[str, Tensor]:
        return {"p2": p.square(), "seen": acc["m"].square() + g.unsqueeze(-2).square()}

    def decide_numbers(self, means: Means, clock: Clock) -> Mapping[str, Tensor]:
        size = self.log_scale.exp() * (means["p2"] + 1e-6).sqrt() ** self.power / (clock.step + 1)
        weights = self.shares * (means["seen"] + 1e-6).rsqrt()
        return {"weights": size[..., None] * weights, "decays": torch.sigmoid(self.decay_logits)}

    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, decided: Mapping[str, Tensor]
    ) -> tuple[Tensor, Accumulators]:
        m = torch.lerp(g.unsqueeze(-2), acc["m"], decided["decays"])
        product = acc["product"] * 0.9
        return -(decided["weights"] * m).sum(-2) * (1 - product), {"m": m, "product": product}
