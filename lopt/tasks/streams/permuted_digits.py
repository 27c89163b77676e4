"""Permuted digits: images whose pixels are shuffled anew now and then, so that the network has to learn them again.

Source: Dohare et al. 2024, "Loss of plasticity in deep continual learning", Nature 632, "Online Permuted MNIST".
Differs from the source: scikit-learn's 8 x 8 digits, a small network, and far fewer examples of a permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.core.random import draw_uniform, fold_in
from lopt.tasks.base import Batch, Task
from lopt.tasks.data.splits import load_digits
from lopt.tasks.mlp import build_mlp, check_network
from lopt.tasks.module import ModuleTask
from lopt.tasks.streams.stream import check_counts


class PermutedDigits(ModuleTask):
    """A classifier 64-width-...-10 of digits whose pixels get a new order every `period` steps; cross-entropy.

    Tasks differ in their orders, initial weights and mini-batches. Pixels are centred, so that they are in [-0.5, 0.5].
    There is no whole split, as there is no order that it could be in.

    Args:
        period: steps from one order to the next.
        width: units of every hidden layer.
        depth: number of hidden layers.
        activation: one of `lopt.tasks.mlp.ACTIVATIONS`.
        batch_size: images per step, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
        ImportError: scikit-learn is missing.
    """

    name = "permuted_digits"

    def __init__(
        self,
        period: int = 200,
        width: int = 32,
        depth: int = 1,
        activation: str = "relu",
        batch_size: int = 8,
        horizon: int = 1000,
    ) -> None:
        check_network(width, depth, activation)
        check_counts(period=period)
        self.period = period
        data = {split: (x - 0.5, y) for split, (x, y) in load_digits().items()}
        widths = [64, *[width] * depth, 10]
        super().__init__(lambda: build_mlp(widths, activation), F.cross_entropy, data, batch_size, horizon)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        """orders `[]` int64: the seed of all orders of pixels."""
        return {"orders": torch.randint(2**62, (), generator=generator)}

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        """order `[T, 64]` int64: that of the pixels at the step."""
        return {"order": draw_uniform(fold_in(tasks["orders"], steps // self.period), 64).argsort(-1)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        return batch | {"x": batch["x"].gather(-1, tasks["order"][:, None].expand_as(batch["x"]))}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        return None
