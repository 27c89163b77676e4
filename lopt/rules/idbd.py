"""IDBD: a learning rate for every weight of a linear model, adapted by gradient descent while it learns.

Source: Sutton 1992, "Adapting bias by gradient descent: an incremental version of delta-bar-delta", AAAI, figure 2,
with the bounds on beta that its text advises.
Differs from the source: inputs are not seen. For the squared error of one example the gradient is -2 delta x, so that
delta x and x^2 follow from gradient and loss, exactly. For other losses and batches, x^2 stands for half the curvature,
g^2 / (4 loss): an estimate that the source does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lopt.rules.base import Rule
from lopt.rules.building_blocks import last_loss
from lopt.rules.building_blocks.features import spread
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, Visit

LEAST_BETA, LARGEST_CHANGE = -10.0, 2.0


class IDBDDecision(NamedTuple):
    """What the elements need, `[*batch, 1s]`.

    Attributes:
        log_lr: the logarithm of the first learning rate.
        meta_rate: of the logarithms' own descent.
        inverse: 1 / (4 loss), or 0 before any loss is known.
    """

    log_lr: Tensor
    meta_rate: Tensor
    inverse: Tensor


class IDBD(Rule):
    """`beta <- beta + meta_rate delta x h; p <- p + e^beta delta x; h <- h (1 - e^beta x^2)+ + e^beta delta x`.

    With delta x = -g / 2 and x^2 = g^2 / (4 loss), as they are for the squared error of one example. State: beta, as
    its distance from log(lr), and the trace h, two numbers per parameter, and the last loss that was told.

    Args:
        lr: e^beta at the start.
        meta_rate: theta of the source; as in any gradient descent there is one beyond which it diverges.
    """

    name = "idbd"
    needs_loss = True
    quick_config: ClassVar = {"lr": 0.2}
    tensor_keys = (last_loss.LOSS_KEY,)

    def __init__(self, lr: float = 0.05, meta_rate: float = 0.01) -> None:
        super().__init__()
        if not lr > 0 or meta_rate < 0:
            raise ValueError(f"lr must be above 0 and meta_rate not negative, got lr={lr} and meta_rate={meta_rate}")
        self.log_lr = nn.Parameter(torch.tensor(log(lr), dtype=torch.float32))
        self.meta_rate = nn.Parameter(torch.tensor(float(meta_rate), dtype=torch.float32))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        batch = p.shape[: p.ndim - layout.ndim]
        return {"beta": torch.zeros_like(p), "trace": torch.zeros_like(p), **last_loss.start_loss(batch, p)}

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        known = last_loss.update_loss(tensors.tensor_state[last_loss.LOSS_KEY], tensors.loss)
        return {last_loss.LOSS_KEY: known}, {"inverse": last_loss.find_inverse(known)}

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        numbers = (self.log_lr, self.meta_rate, shared["inverse"])
        return Decision(decided=IDBDDecision(*(spread(x, layout.ndim) for x in numbers)))

    def move(self, e: Elements, decided: IDBDDecision) -> Visit:
        error_x, trace = -e.g / 2, e.acc["trace"]
        change = (decided.meta_rate * error_x * trace).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
        beta = torch.maximum(e.acc["beta"] + change, LEAST_BETA - decided.log_lr)
        rate = (decided.log_lr + beta).exp()
        delta, square = rate * error_x, e.g * e.g * decided.inverse
        trace = trace * (1 - rate * square).clamp(min=0) + delta
        return Visit({"beta": beta, "trace": trace}, delta=delta)
