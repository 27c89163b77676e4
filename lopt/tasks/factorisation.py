"""Factors of a matrix by some of its entries: two tables of which a batch reaches few rows, as in recommenders.

Source: the model of Koren, Bell & Volinsky 2009, doi 10.1109/MC.2009.263, without offsets; the matrix is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal, draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds

WHOLE = 1024
"""Entries that stand for a whole split, of which there are as many as one likes."""


class Factorisation(TaskFamily):
    """Regression on y = r . c / sqrt(rank) + noise, r and c being rows of two random tables; mean squared error.

    A task is these tables, "rows" `[size, rank]` and "columns" `[size, rank]`, standard normal; the parameters are
    their estimates, `[size, width]`, from N(0, 0.1^2). Mini-batches are indices x `[T, batch_size, 2]` int64, small
    ones more often than large ones (those below a quarter in half of the entries), and y `[T, batch_size]`, other draws
    in each split, of which `WHOLE` stand for all. A metric is the share of the mean square of y that is left
    "unexplained". An output of 0 has a loss of 1 + noise^2 in the mean over tasks.

    Args:
        size: rows, and columns, of the matrix.
        rank: of the matrix.
        width: numbers that the student has for each row, and for each column.
        noise: standard deviation of what no factors can know.
        batch_size: entries per batch, always fresh.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "factorisation"
    examples = ("x", "y")

    def __init__(
        self,
        size: int = 100,
        rank: int = 4,
        width: int = 8,
        noise: float = 0.3,
        batch_size: int = 64,
        horizon: int = 300,
    ) -> None:
        if min(size, rank, width, batch_size) < 1 or noise < 0:
            found = f"got {size}, {rank}, {width}, {batch_size} and {noise}"
            raise ValueError(f"size, rank, width and batch_size must be at least 1 and noise not negative, {found}")
        self.size, self.rank, self.width, self.noise = size, rank, width, noise
        self.batch_size, self.horizon = batch_size, horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """Tables rows and columns, `[size, rank]`."""
        return {
            key: torch.randn(self.size, self.rank, generator=generator, dtype=torch.float32)
            for key in ("rows", "columns")
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {
            key: 0.1 * torch.randn(self.size, self.width, generator=generator, dtype=torch.float32)
            for key in ("rows", "columns")
        }

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return self._draw(tasks, branch_seeds(seeds, SPLITS.index(choose("split", split, SPLITS))), self.batch_size)

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        seed = derive_seeds(0, self.name, SPLITS.index(choose("split", split, SPLITS))).to(tasks["rows"].device)
        return self._draw(tasks, seed.expand(count), WHOLE)

    def _draw(self, tasks: Task, seeds: Tensor, count: int) -> Batch:
        """`count` entries for every seed `[T]`."""
        place = draw_uniform(branch_seeds(seeds, 0), 2 * count).view(-1, count, 2)
        x = (self.size * place.square()).long().clamp(max=self.size - 1)
        row, column = (
            tasks[key].gather(1, x[..., side, None].expand(-1, -1, self.rank))
            for side, key in enumerate(("rows", "columns"))
        )
        unknown = self.noise * draw_normal(branch_seeds(seeds, 1), count).float()
        return {"x": x, "y": (row * column).sum(-1) / self.rank**0.5 + unknown}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        rows, columns = (params[key][batch["x"][..., side]] for side, key in enumerate(("rows", "columns")))
        return F.mse_loss((rows * columns).sum(-1), batch["y"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return {"unexplained": self.loss(params, batch) / batch["y"].square().mean()}
