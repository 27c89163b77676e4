"""Few-shot regression of sine waves: the smallest problem on which a learned initialisation is worth something.

Sources: Finn, Abbeel & Levine 2017, arXiv 1703.03400, section 5.1 (amplitude in [0.1, 5), phase in [0, pi), x in
[-5, 5)); Li et al. 2017, arXiv 1707.09835, section 4.1 (frequency in [0.8, 1.2), too).
Differs from the sources: phases come in strips, of which each pool of tasks has its own.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.random import draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily
from lopt.tasks.batched import BatchedLosses
from lopt.tasks.mlp import build_mlp, check_network
from lopt.tasks.module import draw_weights
from lopt.tasks.strips import STRIP_POOLS, STRIPS, draw_strips

EVEN = 100
"""Points, evenly over all x, on which a wave is judged."""


class Sinusoid(TaskFamily):
    """y = amplitude sin(frequency x + phase), learned from a handful of its points; mean squared error.

    A task is its "wave" `[3]` (amplitude, phase, frequency), the "strip" that the phase is in, int64 `[]`, and the
    places x of the points that are learned from, "support" `[shots, 1]`, and judged on, "query" `[queries, 1]`. The
    train split is the support, at every step; all others are the queries, and, as whole splits, `EVEN` points. A
    network that says 0 has a loss of 4.2 in the mean over tasks. By default 1,761 parameters.

    Args:
        shots: points that a task is learned from.
        queries: other points that it is judged on in training.
        width: units of every hidden layer.
        depth: number of hidden layers.
        spread: frequencies are within this of 1; 0 as in Finn et al.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "sinusoid"
    examples = ("x", "y")
    judged = "inner_valid"
    pool_key = "strip"
    pools = STRIP_POOLS

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        width: int = 40,
        depth: int = 2,
        spread: float = 0.2,
        horizon: int = 10,
    ) -> None:
        check_network(width, depth)
        if min(shots, queries) < 1 or not 0 <= spread < 1:
            found = f"shots={shots}, queries={queries}, spread={spread}"
            raise ValueError(f"shots and queries must be at least 1 and spread from 0 to below 1, got {found}")
        self.shots, self.queries, self.spread, self.horizon = shots, queries, spread, horizon
        self.widths = [1, *[width] * depth, 1]
        self.batched = BatchedLosses(build_mlp(self.widths, "relu"), F.mse_loss)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        drawn = draw_uniform(seeds, 4 + self.shots + self.queries)
        strip, place = draw_strips(drawn[:, :2], pool)
        phase = place * (pi / STRIPS)
        wave = torch.stack([0.1 + 4.9 * drawn[:, 2], phase, 1 + self.spread * (2 * drawn[:, 3] - 1)], 1)
        x = (10 * drawn[:, 4:, None] - 5).float()
        return {
            "wave": wave.float(),
            "strip": strip,
            "support": x[:, : self.shots],
            "query": x[:, self.shots :],
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(lambda: build_mlp(self.widths, "relu"), generator)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        choose("split", split, SPLITS)
        return _make_batch(tasks, tasks["support" if split == "train" else "query"])

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        if split == "train":
            return self.batch(tasks, tasks["strip"])
        choose("split", split, SPLITS)
        x = torch.linspace(-5, 5, EVEN, dtype=torch.float32, device=tasks["wave"].device)
        return _make_batch(tasks, x[:, None].expand(count, -1, -1))

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return F.mse_loss(functional_call(self.batched.module, params, (batch["x"],)), batch["y"])

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.batched(params, batch["x"], batch["y"])


def _make_batch(tasks: Task, x: Tensor) -> Batch:
    """The waves' points at x `[T, B, 1]`."""
    amplitude, phase, frequency = tasks["wave"][:, :, None, None].unbind(1)
    return {"x": x, "y": amplitude * (frequency * x + phase).sin()}
