"""The chained Rosenbrock function: a curved valley that is easy to find and hard to follow.

Source: Rosenbrock 1960, doi 10.1093/comjnl/3.3.175, chained as in `scipy.optimize.rosen`; a test function of learned
optimizers in Wichrowska et al. 2017, arXiv 1703.04813, and Open-L2O.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, ExactTask, Task


class Rosenbrock(ExactTask):
    """sum_i steepness (x_{i+1} - x_i^2)^2 + (a_i - x_i)^2, x starting at N(0, init_std^2).

    A task is a `[dim - 1]`, uniform in [1 - spread, 1 + spread); the parameters are x `[dim]`. For `dim` 2 the optimum
    is 0, at (a, a^2). In more dimensions it is above 0 unless all a_i are 1 (`spread=0`), which is the classical
    function with its optimum 0 at (1, ..., 1).

    Args:
        dim: number of parameters, 2 or more.
        steepness: of the valley's walls; 100 in the source.
        spread: half-width of the distribution of a around 1.
        init_std: standard deviation of the starting point.
        horizon: steps that a problem is meant to be optimised for.
    Raises:
        ValueError: `dim` is below 2, `steepness` not positive, or `spread` negative.
    """

    name = "rosenbrock"

    def __init__(
        self,
        dim: int = 2,
        steepness: float = 100.0,
        spread: float = 0.5,
        init_std: float = 1.0,
        horizon: int = 200,
    ) -> None:
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        if steepness <= 0 or spread < 0:
            raise ValueError(f"steepness must be positive and spread not negative, got {steepness} and {spread}")
        self.dim, self.steepness, self.spread, self.init_std = dim, steepness, spread, init_std
        self.horizon = horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return {"a": 1 + self.spread * (2 * torch.rand(self.dim - 1, generator=generator, dtype=torch.float32) - 1)}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": self.init_std * torch.randn(self.dim, generator=generator, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x, following = params["x"][:-1], params["x"][1:]
        return (self.steepness * (following - x.square()).square() + (batch["a"] - x).square()).sum()
