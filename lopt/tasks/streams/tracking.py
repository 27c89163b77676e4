"""Tracking: linear regression in which few inputs matter and now and then one of them changes its sign.

Source: Sutton 1992, "Adapting bias by gradient descent: an incremental version of delta-bar-delta", section "Does IDBD
choose the right alpha_i?" (20 inputs, 5 relevant, a flip every 20 examples, no noise).
Differs from the source: which inputs are relevant is drawn, and signs are, too, at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.random import draw_normal
from lopt.tasks.base import Batch, Task
from lopt.tasks.streams.stream import LinearStream, check_counts, predict, split_seeds


class Tracking(LinearStream):
    """Predict y = sum of +-x_i over the relevant inputs; every `period` steps one of the signs flips; squared error.

    Inputs are N(0, 1), new at every step, and the weights "w" `[inputs]` start at 0, where the loss is `relevant` in
    the mean. Tasks differ in which inputs are relevant and in the order of the flips.

    Args:
        inputs: number of inputs.
        relevant: how many of them matter.
        period: steps from one flip to the next.
        batch_size: examples per step.
        flips: of a task, after which they are undone in reverse.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "tracking"

    def __init__(
        self,
        inputs: int = 20,
        relevant: int = 5,
        period: int = 20,
        batch_size: int = 1,
        flips: int = 200,
        horizon: int = 1000,
    ) -> None:
        check_counts(inputs=inputs, relevant=relevant, period=period, batch_size=batch_size, flips=flips)
        if relevant > inputs:
            raise ValueError(f"relevant must be at most inputs, {inputs}, got {relevant}")
        self.inputs, self.relevant, self.flips = inputs, relevant, flips
        self.pace, self.batch_size, self.horizon = period, batch_size, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """path `[flips + 1, inputs]` int8: the signs, 0 for irrelevant inputs."""
        relevant = torch.randperm(self.inputs, generator=generator)[: self.relevant]
        flipped = torch.randint(self.relevant, (self.flips,), generator=generator)
        turns = torch.ones(self.flips + 1, self.relevant, dtype=torch.int8)
        turns[0] -= 2 * torch.randint(2, (self.relevant,), generator=generator, dtype=torch.int8)
        turns[torch.arange(self.flips) + 1, flipped] = -1
        path = torch.zeros(self.flips + 1, self.inputs, dtype=torch.int8)
        path[:, relevant] = turns.cumprod(0, dtype=torch.int8)
        return {"path": path}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        draws = draw_normal(split_seeds(seeds, split), self.batch_size * self.inputs).float()
        x = draws.view(-1, self.batch_size, self.inputs)
        return {"x": x, "y": predict(tasks["now"].float(), x)}
