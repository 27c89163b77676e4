"""Regression on a target that wanders, now slowly, now fast.

Source: the random-walk model of adaptive filtering (Widrow et al. 1976, "Stationary and nonstationary learning
characteristics of the LMS adaptive filter").
Differs from the source: the walk is pulled back to 0, so that it has the same variance at all times, and its speed
switches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.random import draw_normal, draw_uniform
from lopt.tasks.base import Batch, Task, branch_seeds
from lopt.tasks.streams.stream import LinearStream, check_counts, predict, split_seeds


class RandomWalk(LinearStream):
    """Predict y = w_t . x + noise, where w_t goes a random walk whose speed switches between two; squared error.

    w_t+1 = sqrt(1 - speed^2) w_t + speed N(0, 1 / inputs), so that 0 has a loss of 1 + noise^2 in the mean at any time.
    The weights "w" `[inputs]` start there.

    Args:
        inputs: number of inputs, N(0, 1) and new at every step.
        slow, fast: the speeds, in [0, 1]; a task starts with either.
        switch: mean number of steps from one switch to the next.
        noise: standard deviation of the targets' noise.
        batch_size: examples per step.
        length: steps of a task's path, after which it goes back.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "random_walk"

    def __init__(
        self,
        inputs: int = 10,
        slow: float = 0.003,
        fast: float = 0.1,
        switch: int = 200,
        noise: float = 0.1,
        batch_size: int = 1,
        length: int = 2000,
        horizon: int = 1000,
    ) -> None:
        check_counts(inputs=inputs, switch=switch, batch_size=batch_size, length=length - 1)
        if not 0 <= slow <= fast <= 1 or noise < 0:
            found = f"slow={slow}, fast={fast}, noise={noise}"
            raise ValueError(f"speeds must be 0 <= slow <= fast <= 1 and noise not negative, got {found}")
        self.inputs, self.slow, self.fast, self.switch, self.noise = inputs, slow, fast, switch, noise
        self.batch_size, self.length, self.horizon = batch_size, length, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """path `[length, inputs]`: the weights at every step."""
        seeds = torch.randint(2**62, (1,), generator=generator)
        return {"path": self.sample_all(seeds, pool)["path"][0]}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        switches = draw_uniform(branch_seeds(seeds, 0), self.length) < 1 / self.switch
        first = (draw_uniform(branch_seeds(seeds, 1), 1) < 0.5).long()
        speed = torch.where((switches.cumsum(1) + first) % 2 == 0, self.slow, self.fast)[..., None]
        moves = draw_normal(seeds, self.length * self.inputs).view(-1, self.length, self.inputs) / self.inputs**0.5
        # One step for all tasks at a time: the walk cannot be drawn at once.
        path = [moves[:, 0]]
        for t in range(1, self.length):
            path.append((1 - speed[:, t] ** 2).sqrt() * path[-1] + speed[:, t] * moves[:, t])
        return {"path": torch.stack(path, 1).float()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        seeds = split_seeds(seeds, split)
        x = draw_normal(seeds, self.batch_size * self.inputs).float().view(-1, self.batch_size, self.inputs)
        noise = self.noise * draw_normal(branch_seeds(seeds, 0), self.batch_size).float()
        return {"x": x, "y": predict(tasks["now"], x) + noise}
