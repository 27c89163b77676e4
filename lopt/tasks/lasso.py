"""Random lasso problems: least squares with an l1 penalty, convex and not smooth.

Source: Chen et al. 2021, arXiv 2103.12828 (Open-L2O; in its code A is square, A and b are standard normal, penalty 1).
Differs from that code: A has more columns than rows, b is A x0 plus a little noise for a sparse x0, so that there is
something to recover, and the penalty is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, ExactTask, Task


class Lasso(ExactTask):
    """|A x - b|^2 / 2 + penalty |x|_1, with the columns of A of unit norm in the mean and x starting at N(0, 1).

    A task is A `[rows, dim]` and b `[rows]`, the parameters are x `[dim]`. b = A x0 + N(0, 0.01^2), where a quarter of
    x0 is standard normal and the rest 0. The subgradient at x_i = 0 has no penalty term. The optimum has no closed
    form; over 200 tasks of the default size it is 0.045 in the mean (FISTA, 20,000 steps); starting points are at 31.

    Args:
        dim: number of parameters.
        rows: number of measurements.
        penalty: weight of the l1 norm.
        horizon: steps that a problem is meant to be optimised for.
    Raises:
        ValueError: `dim` or `rows` is below 1, or the penalty negative.
    """

    name = "lasso"

    def __init__(self, dim: int = 50, rows: int = 25, penalty: float = 0.005, horizon: int = 100) -> None:
        if dim < 1 or rows < 1 or penalty < 0:
            values = f"got {dim}, {rows} and {penalty}"
            raise ValueError(f"dim and rows must be at least 1 and penalty not negative, {values}")
        self.dim, self.rows, self.penalty, self.horizon = dim, rows, penalty, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        matrix = torch.randn(self.rows, self.dim, generator=generator, dtype=torch.float32) / self.rows**0.5
        chosen = torch.rand(self.dim, generator=generator, dtype=torch.float32) < 0.25
        sparse = torch.randn(self.dim, generator=generator, dtype=torch.float32) * chosen
        noise = 0.01 * torch.randn(self.rows, generator=generator, dtype=torch.float32)
        return {"A": matrix, "b": matrix @ sparse + noise}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": torch.randn(self.dim, generator=generator, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = params["x"]
        return (batch["A"] @ x - batch["b"]).square().sum() / 2 + self.penalty * x.abs().sum()
