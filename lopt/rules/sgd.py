"""SGD, heavy-ball momentum and Nesterov's method, equal to `torch.optim.SGD` step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.rules.building_blocks.hand_designed import HandDesigned
from lopt.rules.stages import Accumulators


class SGD(HandDesigned):
    """Plain gradient descent, `p <- p - lr * schedule * g`: the baseline without memory, and the simplest test rule.

    Args:
        lr: learning rate.
        schedule: "constant" or "cosine".
        weight_decay: decoupled.
    """

    name = "sgd"

    def __init__(self, lr: float = 0.1, schedule: str = "constant", weight_decay: float = 0.0) -> None:
        super().__init__(lr=lr, schedule=schedule, weight_decay=weight_decay)

    def init_flat(self, p: Tensor) -> Accumulators:
        return {}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        return g, {}


class Momentum(HandDesigned):
    """Heavy-ball momentum, as `torch.optim.SGD(momentum=...)`: `m <- momentum * m + g; p <- p - lr * m`.

    Gradients are summed, not averaged: the effective step is `lr / (1 - momentum)`. State: one number per parameter.

    Args:
        lr: learning rate.
        momentum: share of the buffer that a step keeps.
        schedule: "constant" or "cosine".
        weight_decay: decoupled.
    """

    name = "momentum"

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        schedule: str = "constant",
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(lr=lr, schedule=schedule, weight_decay=weight_decay, momentum=momentum)

    def init_flat(self, p: Tensor) -> Accumulators:
        return {"m": torch.zeros_like(p)}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        m = self.hyper("momentum") * acc["m"] + g
        return m, {"m": m}


class Nesterov(Momentum):
    """Nesterov's method, as `torch.optim.SGD(nesterov=True)`: momentum that looks ahead.

    `m <- momentum * m + g; p <- p - lr * (g + momentum * m)`. Options and state are those of `Momentum`: one number per
    parameter.
    """

    name = "nesterov"

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        m, acc = super().direction(g, acc, step)
        return g + self.hyper("momentum") * m, acc
