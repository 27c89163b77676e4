"""What streams share: a path that the concept goes, how far a task is on it, and linear regression on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds


class Stream(TaskFamily):
    """Base of families whose tasks have a "path" `[length, ...]`, of which they are at one place at every step.

    `batch` finds that place under the name "now" `[T, ...]`. At the end of the path a task turns round and goes back,
    and so on for ever: a path can be shorter than a run, and nothing jumps.

    Attributes:
        pace: steps that a task stays at a place.
    """

    pace: int = 1

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        path = tasks["path"]
        turn = path.shape[1] - 1
        index = turn - (steps // self.pace % (2 * turn) - turn).abs()
        now = path[torch.arange(len(steps), device=steps.device), index]
        return {key: value for key, value in tasks.items() if key != "path"} | {"now": now}


class LinearStream(Stream):
    """Base of streams of linear regression with squared error: weights "w" `[inputs]` that start at 0.

    Mini-batches are "x" `[T, B, inputs]` and "y" `[T, B]`.
    """

    examples = ("x", "y")
    inputs: int

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"w": torch.zeros(self.inputs, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (predict(params["w"], batch["x"]) - batch["y"]).square().mean(-1)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.loss(params, batch)


def predict(weights: Tensor, x: Tensor) -> Tensor:
    """Inner products `[..., B]` of weights `[..., d]` and inputs `[..., B, d]`."""
    return (x @ weights[..., None])[..., 0]


def split_seeds(seeds: Tensor, split: str) -> Tensor:
    """Seeds of a split's draws: a stream has examples without end, so that splits differ in nothing else.

    Raises:
        ValueError: there is no such split.
    """
    return branch_seeds(seeds, SPLITS.index(choose("split", split, SPLITS)))


def check_counts(**counts: int) -> None:
    """Refuse options that count something and are below 1, by name.

    Raises:
        ValueError: names the first.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
