"""RMSprop, equal to `torch.optim.RMSprop` step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.building_blocks.hand_designed import HandDesigned
from lopt.rules.stages import Accumulators


class RMSprop(HandDesigned):
    """The gradient over its running root mean square; Adam without momentum and without bias correction.

    `v <- alpha * v + (1 - alpha) * g^2; p <- p - lr * g / (sqrt(v) + eps)`. State: one number per parameter.

    Args:
        lr: learning rate.
        alpha: decay of the second moment.
        eps: added to its root.
        schedule: "constant" or "cosine".
        weight_decay: decoupled.
    """

    name = "rmsprop"
    square_keys = ("v",)

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        schedule: str = "constant",
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(lr=lr, schedule=schedule, weight_decay=weight_decay, alpha=alpha, eps=eps)

    def init_flat(self, p: Tensor) -> Accumulators:
        return {"v": torch.zeros_like(p)}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        alpha = self.hyper("alpha")
        v = alpha * acc["v"] + (1 - alpha) * g * g
        return g / (safe_sqrt(v) + self.hyper("eps")), {"v": v}
