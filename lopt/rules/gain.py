"""Gain: a step size for every weight that is adapted while it learns; how, is learned.

Sources: Sutton 1992, "Gain adaptation beats least squares?", algorithm K1, for the trace and the common bound on a
step; Mahmood et al. 2012, "Tuning-free step-size adaptation", for agreement in units of its own size.
Differs from the sources: gradients are in units of their root mean square; step sizes follow the agreement of all
weights together, too, and averages of both; all rates are meta-weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lopt.rules.base import Rule
from lopt.rules.building_blocks import last_loss
from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.building_blocks.features import spread
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, Sum, Visit

SLOW = 0.999
"""Decay of the second moments, of gradients and of agreements."""

AVERAGES = (0.9, 0.99)
"""Decays of the averages of agreement."""

LARGEST, FARTHEST = 5.0, 12.0
"""Of an agreement in its unit, and of a step size's logarithm from its start."""

UNIT = 0.01
"""Of the meta-weights `own` and `joint`, so that all are learned at the same pace."""


class GainDecision(NamedTuple):
    """What a tensor's elements need, `[*batch, 1s]`, but for the rates `own`, `[*batch, 3, 1s]`.

    Attributes:
        log_lr: logarithm of the step size that all weights start from.
        correction: of the second moments, for the steps that there have been.
        inverse: 1 / (4 loss) or 0.
        bound: on the common step, at least 1.
        own: what a weight's agreement and its averages add to the log step size.
        joint: what the agreement of all weights adds.
        pull: share of the way back to the start, in each step.
        keep: share of the trace that a step leaves.
        power: of the gradient's root mean square, by which it is divided.
    """

    log_lr: Tensor
    correction: Tensor
    inverse: Tensor
    bound: Tensor
    own: Tensor
    joint: Tensor
    pull: Tensor
    keep: Tensor
    power: Tensor


class Gain(Rule):
    """`p <- p - a g / (2 u (1 + r sum c))`, where log a of each weight follows its agreement -g h.

    h is a trace of the weight's last steps, u a learned power of the gradient's root mean square, and c = a g^2 /
    (4 loss u) the share of the error that the weight's step would remove by itself. Where steps agree with what
    gradients say later, a grows; without news it returns to where it started. The sum is over all weights of the model,
    so that a step never goes much beyond where the error is 0. Its state is never reset, and needs no known end. State:
    six numbers per parameter, and four per tensor.

    Args:
        lr: a at the start.
    """

    name = "gain"
    needs_loss = True
    tensor_keys = (last_loss.LOSS_KEY, "all")
    square_keys = ("v", "s")
    temporaries = 8
    quick_config: ClassVar = {"lr": 0.2}
    log_lr: Tensor
    own: Tensor
    joint: Tensor
    log_bound: Tensor
    power: Tensor

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        starts = {"log_lr": log(lr), "own": (1.0, 0.0, 0.0), "joint": (0.2, 0.0, 0.0), "log_bound": 0.0}
        logits = {"pull": -7.0, "keep": 7.0, "power": 2.0}
        for name, value in (starts | logits).items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float32)))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        batch = p.shape[: p.ndim - layout.ndim]
        elements = {key: torch.zeros_like(p) for key in ("log_rate", "trace", "v", "s")}
        averages = p.new_zeros(*batch, len(AVERAGES), *layout.shape)
        rows = last_loss.start_loss(batch, p) | {"all": p.new_zeros(*batch, 1 + len(AVERAGES))}
        return elements | {"averages": averages} | rows

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        axes = e.layout.axes
        v = torch.lerp(e.g * e.g, e.acc["v"], SLOW)
        share = e.acc["log_rate"].exp() * e.g * e.g / safe_sqrt(v) ** spread(self.power.sigmoid(), e.layout.ndim)
        sums = {"share": share, "agreement": -e.g * e.acc["trace"]}
        return Visit(sums={key: Sum(x.sum(axes, keepdim=True), axes) for key, x in sums.items()})

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        known = last_loss.update_loss(tensors.tensor_state[last_loss.LOSS_KEY], tensors.loss)
        rows = tensors.tensor_state["all"]
        inverse = last_loss.find_inverse(known)
        # What averages that start at 0 lack after this step.
        correction = (1 - SLOW ** (tensors.clock.step + 1).to(rows.dtype)).expand(rows.shape[:-1])
        share, agreement = (_add_up(tensors, key, rows.ndim - 2) for key in ("share", "agreement"))
        share = share * self.log_lr.exp()[..., None] * correction ** (self.power.sigmoid()[..., None] / 2) * inverse
        # Every tensor keeps the same rows: what is known of all weights together.
        s = torch.lerp(agreement.square(), rows[..., 0], SLOW)
        agreed = _scale(agreement, s, correction)[..., None]
        averages = torch.lerp(agreed, rows[..., 1:], _list_decays(rows))
        shared = {
            "inverse": inverse,
            "correction": correction,
            "bound": 1 + self.log_bound.exp()[..., None] * share,
            "joint": UNIT * (torch.cat([agreed, averages], -1) * self.joint.unsqueeze(-2)).sum(-1),
        }
        return {last_loss.LOSS_KEY: known, "all": torch.cat([s[..., None], averages], -1)}, shared

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        numbers = shared | {"log_lr": self.log_lr, "own": UNIT * self.own}
        numbers |= {key: getattr(self, key).sigmoid() for key in ("pull", "keep", "power")}
        return Decision(decided=GainDecision(**{key: spread(x, layout.ndim) for key, x in numbers.items()}))

    def move(self, e: Elements, decided: GainDecision) -> Visit:
        ndim, d = e.layout.ndim, decided
        g, log_rate, squares = e.g, e.acc["log_rate"], e.g * e.g
        agreement = -g * e.acc["trace"]
        v, s = (torch.lerp(x, e.acc[key], SLOW) for key, x in (("v", squares), ("s", agreement.square())))
        agreed = _scale(agreement, s, d.correction).unsqueeze(-ndim - 1)
        averages = torch.lerp(agreed, e.acc["averages"], spread(_list_decays(g), ndim))
        change = (torch.cat([agreed, averages], -ndim - 1) * d.own).sum(-ndim - 1) + d.joint
        log_rate = (log_rate * (1 - d.pull) + change).clamp(-FARTHEST, FARTHEST)
        rate = (d.log_lr + log_rate).exp() / (safe_sqrt(v / d.correction) ** d.power * d.bound)
        delta = -rate * g / 2
        trace = (e.acc["trace"] + delta) * (1 - rate * squares * d.inverse).clamp(min=0) * d.keep
        return Visit({"log_rate": log_rate, "trace": trace, "v": v, "s": s, "averages": averages}, delta=delta)


def _add_up(tensors: AllTensors, key: str, dim: int) -> Tensor:
    """The sum over all elements of all tensors, `[*batch, n]`, the same for each."""
    parts = [
        means[key].flatten(dim + 1)[..., 0] * prod(layout.shape)
        for means, layout in zip(tensors.means, tensors.layouts, strict=True)
    ]
    joined = torch.cat(parts, dim)
    return joined.sum(dim, keepdim=True).expand_as(joined)


def _list_decays(like: Tensor) -> Tensor:
    """`AVERAGES`, filled in where `like` is, so that no copy makes the host wait for a device."""
    return torch.stack([like.new_full((), decay) for decay in AVERAGES])


def _scale(agreement: Tensor, s: Tensor, correction: Tensor) -> Tensor:
    """In units of its root mean square."""
    return (agreement / safe_sqrt(s / correction)).clamp(-LARGEST, LARGEST)
