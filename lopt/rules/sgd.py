"""SGD, heavy-ball momentum and Nesterov's method, equal to `torch.optim.SGD` step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.rules.building_blocks.hand_designed import HandDesigned
from lopt.rules.stages import Accumulators


class SGD(HandDesigned):
    """`p <- p - lr * g`."""

    name = "sgd"

    def __init__(self, lr: float = 0.1, schedule: str = "constant", weight_decay: float = 0.0) -> None:
        super().__init__(lr=lr, schedule=schedule, weight_decay=weight_decay)

    def init_flat(self, p: Tensor) -> Accumulators:
        """No memory."""
        return {}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        """The gradient."""
        return g, {}


class Momentum(HandDesigned):
    """`m <- momentum * m + g; p <- p - lr * m`."""

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
        """The momentum buffer."""
        return {"m": torch.zeros_like(p)}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        """The momentum buffer after this step."""
        m = self.hyper("momentum") * acc["m"] + g
        return m, {"m": m}


class Nesterov(Momentum):
    """`m <- momentum * m + g; p <- p - lr * (g + momentum * m)`."""

    name = "nesterov"

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        """The look-ahead momentum."""
        m, acc = super().direction(g, acc, step)
        return g + self.hyper("momentum") * m, acc
