"""Random least-squares problems f(x) = |W x - y|^2.

Source: Andrychowicz et al. 2016, arXiv 1606.04474, section 3.1 (10-D; W and y Gaussian). The published code
draws W and y uniformly in [0, 1), which is a different and much easier problem: say which one is meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, ExactTask, Task

DISTRIBUTIONS = ("gaussian", "uniform")


class Quadratic(ExactTask):
    """`dim`-dimensional quadratics |W x - y|^2, x starting at N(0, init_std^2): the first problem to try a rule on.

    A task is W `[dim, dim]` and y `[dim]`, the parameters are x `[dim]`. The optimum is 0 wherever W is invertible.

    Args:
        dim: number of parameters.
        distribution: of the entries of W and y: "gaussian" N(0, 1) or "uniform" [0, 1).
        init_std: standard deviation of the starting point (0.01 in the published code).
        horizon: steps that a problem is meant to be optimised for.
    Raises:
        ValueError: `dim` is below 1, or the distribution unknown.
    """

    name = "quadratic"

    def __init__(
        self,
        dim: int = 10,
        distribution: str = "gaussian",
        init_std: float = 0.01,
        horizon: int = 100,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.init_std, self.horizon = dim, init_std, horizon
        self.distribution = choose("distribution", distribution, DISTRIBUTIONS)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        draw = torch.randn if self.distribution == "gaussian" else torch.rand
        return {
            "W": draw(self.dim, self.dim, generator=generator, dtype=torch.float32),
            "y": draw(self.dim, generator=generator, dtype=torch.float32),
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": self.init_std * torch.randn(self.dim, generator=generator, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (batch["W"] @ params["x"] - batch["y"]).square().sum()
