"""Rotating Gaussians: classes on a circle that turns while they are learned."""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.random import draw_indices, draw_normal
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.batched import BatchedLosses
from lopt.tasks.mlp import build_mlp, check_network
from lopt.tasks.module import draw_weights
from lopt.tasks.streams.stream import check_counts, split_seeds


class Rotating(TaskFamily):
    """Tell `classes` Gaussians apart whose means lie evenly on the unit circle, which turns; cross-entropy.

    The network is inputs-width-...-classes. A task is its angle at the start, its speed and its direction. A metric is
    the accuracy.

    Args:
        classes: number of Gaussians.
        std: of each of them, in both directions: how much no network can know.
        inputs: the two that matter, and others that are N(0, 1) and do not.
        slow, fast: speeds of tasks are log-uniform between these, in turns per step.
        width: units of every hidden layer.
        depth: number of hidden layers.
        activation: one of `lopt.tasks.mlp.ACTIVATIONS`.
        batch_size: examples per step.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "rotating"
    examples = ("x", "y")

    def __init__(
        self,
        classes: int = 4,
        std: float = 0.4,
        inputs: int = 2,
        slow: float = 0.0002,
        fast: float = 0.005,
        width: int = 16,
        depth: int = 1,
        activation: str = "tanh",
        batch_size: int = 1,
        horizon: int = 1000,
    ) -> None:
        check_network(width, depth, activation)
        check_counts(batch_size=batch_size)
        if classes < 2 or inputs < 2:
            raise ValueError(f"classes and inputs must be at least 2, got {classes} and {inputs}")
        if not 0 < slow <= fast < 0.5 or std <= 0:
            found = f"slow={slow}, fast={fast}, std={std}"
            raise ValueError(f"speeds must be 0 < slow <= fast < 0.5 and std above 0, got {found}")
        self.classes, self.std, self.inputs, self.slow, self.fast = classes, std, inputs, slow, fast
        self.batch_size, self.horizon = batch_size, horizon
        self.widths, self.activation = [inputs, *[width] * depth, classes], activation
        self.module = build_mlp(self.widths, activation)
        self.batched = BatchedLosses(self.module, F.cross_entropy)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """phase and speed `[]`, float64: in turns and in turns per step, negative one way."""
        phase, place, way = torch.rand(3, generator=generator, dtype=torch.float64)
        speed = self.slow * (place * log(self.fast / self.slow)).exp()
        return {"phase": phase, "speed": torch.where(way < 0.5, -speed, speed)}

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        return tasks | {"phase": tasks["phase"] + tasks["speed"] * steps}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(lambda: build_mlp(self.widths, self.activation), generator)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        seeds = split_seeds(seeds, split)
        y = draw_indices(branch_seeds(seeds, 0), self.batch_size, self.classes)
        angle = 2 * pi * (tasks["phase"][:, None] + y / self.classes)
        means = torch.stack([angle.cos(), angle.sin()], -1)
        x = draw_normal(seeds, self.inputs * self.batch_size).view(-1, self.batch_size, self.inputs)
        return {"x": torch.cat([means + self.std * x[..., :2], x[..., 2:]], -1).float(), "y": y}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(functional_call(self.module, params, (batch["x"],)), batch["y"])

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.batched(params, batch["x"], batch["y"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        output = functional_call(self.module, params, (batch["x"],))
        return {"accuracy": (output.argmax(-1) == batch["y"]).float().mean()}
