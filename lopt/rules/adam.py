"""Adam, AdamW and NAdamW, equal to torch.optim's step by step.

Sources: Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101); Dozat 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.building_blocks.hand_designed import HandDesigned
from lopt.rules.stages import Accumulators


class Adam(HandDesigned):
    """The baseline of most comparisons, with its hyper-parameters as meta-weights: `torch.optim.Adam` step by step.

    `p <- p - lr * schedule * m_hat / (sqrt(v_hat) + eps)`, with first and second moment corrected for their start at 0
    (Kingma & Ba 2015, algorithm 1). State: two numbers per parameter.

    Args:
        lr: learning rate.
        beta1, beta2: decays of the moments.
        eps: added to the root of the second moment.
        schedule: "constant" or "cosine".
        weight_decay: decoupled, as AdamW has it.
    """

    name = "adam"
    square_keys = ("v",)

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        schedule: str = "constant",
        weight_decay: float = 0.0,
    ) -> None:
        hyper = {"beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(lr=lr, schedule=schedule, weight_decay=weight_decay, **hyper)

    def init_flat(self, p: Tensor) -> Accumulators:
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        return direct_adam(g, acc, step, self.hyper("beta1"), self.hyper("beta2"), self.hyper("eps"))


class AdamW(Adam):
    """Adam with decoupled weight decay 0.01, torch's default, and all else as for `Adam`.

    Decay is multiplied by the learning rate and its schedule, but is no part of the gradient and hence of the moments
    (Loshchilov & Hutter 2019, algorithm 2). State: two numbers per parameter.
    """

    name = "adamw"
    square_keys = ("v",)

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        schedule: str = "constant",
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(lr, beta1, beta2, eps, schedule, weight_decay)


class NAdamW(AdamW):
    """Nesterov Adam with decoupled weight decay: `torch.optim.NAdam(decoupled_weight_decay=True)` step by step.

    Gradient and momentum are mixed by the schedule `mu_t = beta1 (1 - 0.96^(0.004 t) / 2)`, which looks one step ahead
    (Dozat 2016). State: two numbers per parameter, and the running product of mu, one per tensor.
    """

    name = "nadamw"
    square_keys = ("v",)
    momentum_decay = 4e-3  # torch's default

    def init_flat(self, p: Tensor) -> Accumulators:
        return super().init_flat(p) | {"product": p.new_ones(*p.shape[:-1], 1)}

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        beta1, beta2, eps = self.hyper("beta1"), self.hyper("beta2"), self.hyper("eps")
        m, v = update_moments(g, acc, beta1, beta2)
        mu = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * self.momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 2) * self.momentum_decay))
        product = acc["product"] * mu
        mixed = g * ((1 - mu) / (1 - product)) + m * (mu_next / (1 - product * mu_next))
        return mixed / scale_moment(v, step, beta2, eps), {"m": m, "v": v, "product": product}


def update_moments(g: Tensor, acc: Accumulators, beta1: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moment after this step, not yet bias-corrected, `[*batch, N]`.

    Args:
        g: gradients `[*batch, N]`.
        acc: the moments "m" and "v" before it.
        beta1, beta2: their decays, `[*batch or (), 1]`.
    """
    return torch.lerp(g, acc["m"], beta1), beta2 * acc["v"] + (1 - beta2) * g * g


def scale_moment(v: Tensor, step: Tensor, beta2: Tensor, eps: Tensor) -> Tensor:
    """`sqrt(v_hat) + eps`, by which Adam divides; `step` is `[*batch, 1]`, updates before this one."""
    return safe_sqrt(v / (1 - beta2 ** (step + 1))) + eps


def direct_adam(
    g: Tensor, acc: Accumulators, step: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor
) -> tuple[Tensor, Accumulators]:
    """Adam's direction, `HandDesigned.direction` with the numbers as arguments, `[*batch or (), 1]` each."""
    m, v = update_moments(g, acc, beta1, beta2)
    m_hat = m / (1 - beta1 ** (step + 1))
    return m_hat / scale_moment(v, step, beta2, eps), {"m": m, "v": v}
