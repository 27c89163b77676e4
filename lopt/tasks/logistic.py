"""Random logistic regression: two classes of noisy labels, an l2 penalty, strongly convex.

Source: Wichrowska et al. 2017, arXiv 1703.04813, and Open-L2O have such problems in their training sets (softmax
regression on random examples with noisy labels). Differs from theirs: labels are drawn from a model, features have
random units.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, ExactTask, Task


class Logistic(ExactTask):
    """mean_j log(1 + exp(-y_j (<x_j, w> + b))) + penalty |w|^2 / 2 on all of a task's examples, w starting at N(0, 1).

    A task is the examples x `[count, dim]` and their labels y `[count]`, -1 or 1; the parameters are w `[dim]` and b
    `[]`, which starts at 0; a metric is the accuracy on the task's examples. Examples are N(0, S) with standard
    deviations log-uniform in [0.1, 10] per coordinate (condition number about 1e4); labels are drawn with the
    probabilities of a random w0 in units of S. The optimum has no closed form; over 200 tasks of the default size it is
    0.469 in the mean (Newton's method); starting points are at 3.8.

    Args:
        dim: number of features; dim + 1 parameters.
        count: examples of a task.
        penalty: weight of the squared norm.
        horizon: steps that a problem is meant to be optimised for.
    Raises:
        ValueError: `dim` or `count` is below 1, or the penalty negative.
    """

    name = "logistic"

    def __init__(self, dim: int = 10, count: int = 100, penalty: float = 0.005, horizon: int = 100) -> None:
        if dim < 1 or count < 1 or penalty < 0:
            values = f"got {dim}, {count} and {penalty}"
            raise ValueError(f"dim and count must be at least 1 and penalty not negative, {values}")
        self.dim, self.count, self.penalty, self.horizon = dim, count, penalty, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        scale = 10 ** (2 * torch.rand(self.dim, generator=generator, dtype=torch.float32) - 1)
        standard = torch.randn(self.count, self.dim, generator=generator, dtype=torch.float32)
        slope = 2 * torch.randn(self.dim, generator=generator, dtype=torch.float32) / self.dim**0.5
        chance = torch.sigmoid(standard @ slope)
        positive = torch.rand(self.count, generator=generator, dtype=torch.float32) < chance
        return {"x": standard * scale, "y": 2 * positive.float() - 1}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {
            "w": torch.randn(self.dim, generator=generator, dtype=torch.float32),
            "b": torch.zeros((), dtype=torch.float32),
        }

    def loss(self, params: Params, batch: Batch) -> Tensor:
        margin = batch["y"] * (batch["x"] @ params["w"] + params["b"])
        return F.softplus(-margin).mean() + self.penalty / 2 * params["w"].square().sum()

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        margin = batch["y"] * (batch["x"] @ params["w"] + params["b"])
        return {"accuracy": (margin > 0).float().mean()}
