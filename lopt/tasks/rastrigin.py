"""Random Rastrigin functions: a quadratic bowl under a lattice of local minima.

Source: Cao et al. 2019, arXiv 1911.03787; Chen et al. 2021, arXiv 2103.12828, whose code (Open-L2O) has alpha 10 and
the same distributions. Differs from that code: the constant is alpha dim, not alpha dim^2.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, ExactTask, Task


class Rastrigin(ExactTask):
    """|A x - b|^2 / 2 - alpha <c, cos(2 pi x)> + alpha dim; A, b, c and the starting point are standard normal.

    A task is A `[dim, dim]`, b `[dim]` and c `[dim]`, the parameters are x `[dim]`. c may be negative and larger than
    1, so the optimum is not 0; it is at least alpha (dim - |c|_1), which is alpha dim (1 - sqrt(2 / pi)), about 0.2
    alpha dim, in the mean, and that is reached only if A x = b has a solution on the lattice.

    Args:
        dim: number of parameters.
        alpha: height of the local minima's walls; 0 leaves the bowl.
        horizon: steps that a problem is meant to be optimised for.
    Raises:
        ValueError: `dim` is below 1, or `alpha` negative.
    """

    name = "rastrigin"

    def __init__(self, dim: int = 10, alpha: float = 10.0, horizon: int = 100) -> None:
        if dim < 1 or alpha < 0:
            raise ValueError(f"dim must be at least 1 and alpha not negative, got {dim} and {alpha}")
        self.dim, self.alpha, self.horizon = dim, alpha, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return {
            "A": torch.randn(self.dim, self.dim, generator=generator, dtype=torch.float32),
            "b": torch.randn(self.dim, generator=generator, dtype=torch.float32),
            "c": torch.randn(self.dim, generator=generator, dtype=torch.float32),
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": torch.randn(self.dim, generator=generator, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = params["x"]
        bowl = (batch["A"] @ x - batch["b"]).square().sum() / 2
        return bowl + self.alpha * (self.dim - (batch["c"] * (2 * pi * x).cos()).sum())
