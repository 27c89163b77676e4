"""Celo: a per-parameter MLP whose steps a learned schedule scales, and Celo-Adam: Adam under such a schedule.

Source: Moudgil et al. 2025, arXiv 2501.12670, with its released code and weights.
Differs from the source: what has no effect there is left out: a mixing layer (1,216 of the 36,865 weights of
Celo-Adam), and in Celo also the head over a bank of one MLP and the MLP's third output (1,286 of 37,089).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.factored_mlp import FEATURE_NAMES, FactoredMLP
from lopt.rules.building_blocks.scheduler import FEATURE_NAMES as SCHEDULER_FEATURES
from lopt.rules.building_blocks.scheduler import ROW_KEYS, Scheduler
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, Visit

STEP_MULT = 1e-3


class CeloScheduler(Scheduler):
    """The learned schedule of Celo: progress and loss -> `0.1 exp(w h + b)`, a factor on the steps of a model.

    All tensors have equal inputs and so get the same factor; each keeps a row, so that tensors may join later.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(0, width, {"step": 1}, int(derive_seeds(seed, "celo scheduler")))

    def forward(self, rows: Accumulators, loss: Tensor | None, clock: Clock) -> tuple[Accumulators, Tensor]:
        """One step of the schedule for all n tensors: their new rows, and the factors `[*batch, n]` on their steps.

        Args:
            rows: the tensors' `ROW_KEYS`, `[*batch, n, features]`.
            loss: `[*batch, 1]`, or None, with which the loss buffer stays as it was.
            clock: `[*batch, 1 or n]`, with the planned number of steps.
        """
        assert clock.num_steps is not None, "step_tensors has seen to it"
        z, rows = self.observe(rows, loss, clock, clock.num_steps)
        h, rows = self.advance(z, rows, clock.step)
        # Unlike VeLO's factor, which is linear, an exponential cannot turn a step around.
        return rows, 0.1 * torch.exp(self.read("step", h)[..., 0])


class Scheduled(Rule):
    """A rule whose steps Celo's scheduler scales: `decide` and `gain` find lambda `[*batch]` in `shared["factor"]`.

    Its subclasses add the scheduler's row to the accumulators, and need the loss and the planned number of steps.
    """

    needs_loss = True
    needs_num_steps = True
    tensor_keys = ROW_KEYS
    scheduler: CeloScheduler

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        tensor_state, factor = self.scheduler(tensors.tensor_state, tensors.loss, tensors.clock)
        return tensor_state, {"factor": factor}


class Celo(Scheduled, FactoredMLP):
    """`p <- p - 0.001 lambda rms(p) d exp(0.001 a)`, with lambda from an LSTM on progress and loss.

    For runs whose length is known in advance: the schedule is learned, too (section 4 of the paper). State: that of
    small_fc, and one row of the scheduler per tensor.

    Args:
        hidden: width of the MLP's two hidden layers.
        width: of the scheduler's LSTM.
        seed: of the initial meta-weights.
    """

    name = "celo"
    quick_config: ClassVar = {"width": 8}
    feature_names = (*FEATURE_NAMES, *SCHEDULER_FEATURES)

    def __init__(self, hidden: int = 4, width: int = 64, seed: int = 0) -> None:
        super().__init__([len(FEATURE_NAMES), hidden, hidden, 2], seed)
        self.scheduler = CeloScheduler(width, seed)

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return super().init_accumulators(p, layout) | self.scheduler.start(tuple(p.shape[: p.ndim - layout.ndim]), p)

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return STEP_MULT * shared["factor"] * self.parameter_rms(mean_squares)


class CeloAdam(Scheduled):
    """`p <- p - 0.001 lambda m_hat / (sqrt(v_hat + 1e-10) + 1e-8)`, with lambda from an LSTM on progress and loss.

    Args:
        width: of the scheduler's LSTM.
        beta1, beta2: decays of the moments.
        seed: of the initial meta-weights.
    """

    name = "celo_adam"
    square_keys = ("v",)
    quick_config: ClassVar = {"width": 8}
    feature_names = ("m_hat / sqrt(v_hat)", *SCHEDULER_FEATURES)

    def __init__(self, width: int = 64, beta1: float = 0.9, beta2: float = 0.999, seed: int = 0) -> None:
        super().__init__()
        self.scheduler = CeloScheduler(width, seed)
        self.beta1, self.beta2 = beta1, beta2

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        tensor_state = self.scheduler.start(tuple(p.shape[: p.ndim - layout.ndim]), p)
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} | tensor_state

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        # Numbers of the whole tensor are computed here once, not for every chunk of elements.
        count = clock.step.to(shared["factor"].dtype) + 1
        numbers = STEP_MULT * shared["factor"], 1 / (1 - self.beta1**count), 1 / (1 - self.beta2**count)
        return Decision(decided=[features.spread(number, layout.ndim) for number in numbers])

    def move(self, e: Elements, decided: list[Tensor]) -> Visit:
        # One eps is within the root and one outside, as in the source; the inner one keeps derivatives finite at v = 0.
        size, correct_m, correct_v = decided
        m = torch.lerp(e.g, e.acc["m"], self.beta1)
        v = torch.lerp(e.g.square(), e.acc["v"], self.beta2)
        return Visit({"m": m, "v": v}, delta=-size * (m * correct_m) / ((v * correct_v + 1e-10).sqrt() + 1e-8))
