"""The shared part of hand-designed optimizers written as rules: a learning rate and its schedule.

Their hyper-parameters are the meta-weights, so a grid of learning rates is a population of one rule, and the
rules serve as tuned baselines, as teachers for imitation and as oracles in tests.
"""

from __future__ import annotations

from abc import abstractmethod
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

from lopt.rules.building_blocks.elementwise import ElementwiseRule
from lopt.rules.stages import Accumulators

SCHEDULES = ("constant", "cosine")


class HandDesigned(ElementwiseRule):
    """`p <- p - lr * schedule(progress) * (direction + weight_decay * p)`.

    Args:
        lr: learning rate, the meta-weight `lr`.
        schedule: "constant", or "cosine" (decays to 0 at the end of the planned steps).
        weight_decay: decoupled, as in AdamW.
        hyper: other scalars that become meta-weights of their names.
    """

    def __init__(self, *, lr: float, schedule: str = "constant", weight_decay: float = 0.0, **hyper: float) -> None:
        super().__init__()
        self.config = {
            "lr": lr,
            "schedule": schedule,
            "weight_decay": weight_decay,
        } | self.config  # rule files have this order
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
        self.schedule = schedule
        self.needs_num_steps = schedule == "cosine"
        # Every number is a meta-weight: a grid of them is a population, and their gradients can be checked.
        for name, value in {"lr": lr, "weight_decay": weight_decay, **hyper}.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value), dtype=torch.float32)))

    @abstractmethod
    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        """What is subtracted from the parameters, before learning rate, schedule and weight decay.

        Args:
            g: gradients `[*batch, N]`.
            acc: from `init_flat` or the previous step.
            step: updates made so far, `[*batch, 1]`.
        Returns:
            The direction `[*batch, N]` and the new accumulators.
        """

    def hyper(self, name: str) -> Tensor:
        """The hyper-parameter `[*batch or (), 1]`, ready to broadcast against `[*batch, N]`."""
        value: Tensor = getattr(self, name)
        return value[..., None]

    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        direction, acc = self.direction(g, acc, step)
        lr: Any = self.hyper("lr")
        if self.schedule == "cosine":
            assert progress is not None, "step_tensors has seen to it"
            # Beyond the planned steps the cosine would rise again; it stays at 0.
            lr = lr * (0.5 * (1 + torch.cos(pi * progress.clamp(max=1))))
        return -lr * (direction + self.hyper("weight_decay") * p), acc
