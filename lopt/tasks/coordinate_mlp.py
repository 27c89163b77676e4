"""Networks that fit a photograph: from a pixel's coordinates to its colour.

Sources: Tancik et al. 2020, arXiv 2006.10739 (random Fourier features of the coordinates); Sitzmann et al. 2020,
arXiv 2006.09661 (sine activations and their initialisation).
"""

from __future__ import annotations

from itertools import pairwise
from math import pi
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Data, Task
from lopt.tasks.data.splits import load_photographs, to_pixels
from lopt.tasks.mlp import build_mlp, check_network
from lopt.tasks.module import ModuleTask

Coordinates = TypeVar("Coordinates", bound="CoordinateMLP")

ENCODINGS = ("fourier", "sine")
PHOTOGRAPHS = {"both": slice(None), "temple": slice(0, 1), "flower": slice(1, 2)}
SHRINK = 4
"""Pixels of a photograph that are averaged, in each direction, before it is cut."""


class Fourier(nn.Module):
    """Sines and cosines of random multiples of the coordinates, for a plain perceptron to read instead of them.

    The multiples are the same for all tasks and on every machine. Source: Tancik et al. 2020, arXiv 2006.10739.

    Args:
        count: random directions; twice as many features.
        frequency: standard deviation of the directions, in half periods per unit of the coordinates.
    """

    directions: Tensor

    def __init__(self, count: int, frequency: float) -> None:
        super().__init__()
        generator = make_generator(derive_seeds(0, "fourier"))
        self.register_buffer("directions", frequency * torch.randn(2, count, generator=generator, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates `[B, 2]` to features `[B, 2 count]`: all sines, then all cosines."""
        phase = pi * (x @ self.directions.to(x.dtype))
        return torch.cat([phase.sin(), phase.cos()], -1)


class Sine(nn.Module):
    """A linear layer and a sine of `frequency` times its output, initialised as in the source.

    Source: Sitzmann et al. 2020, arXiv 2006.09661.

    Args:
        fan_in, fan_out: units before and after.
        frequency: factor on the output before the sine.
        first: whether the layer reads the coordinates, which have another initialisation.
    """

    def __init__(self, fan_in: int, fan_out: int, frequency: float, *, first: bool) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(fan_in, fan_out), frequency
        bound = 1 / fan_in if first else (6 / fan_in) ** 0.5 / frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, fan_in]` to `[B, fan_out]`, in [-1, 1]."""
        y: Tensor = (self.frequency * self.linear(x)).sin()
        return y


class CoordinateMLP(ModuleTask):
    """(x, y) in [-1, 1] to red, green and blue in [0, 1]; mean squared error. Each task is a cut-out of a photograph.

    A task is "place" `[3]` int64: the photograph, the row and the column of the cut-out, which are drawn. The two
    photographs are scikit-learn's, shrunk 4 times to 106 x 160 pixels. A cut-out's pixels are divided in four splits,
    the same places in all tasks; mini-batches are coordinates x `[T, batch_size, 2]` and colours y
    `[T, batch_size, 3]`, both float32. A metric is "psnr", the peak signal-to-noise ratio in decibels. The best
    constant colour has a loss of 0.036 in the mean over tasks. By default 2,211 parameters.

    Args:
        encoding: "fourier" (random features, then ReLU) or "sine" (sine activations on the coordinates themselves).
        width: units of every hidden layer.
        depth: number of hidden layers.
        features: random directions, for "fourier"; twice as many features.
        frequency: standard deviation of the directions, in half periods over the cut-out's half width, or for "sine"
            the factor in all sines.
        size: height and width of a cut-out in pixels.
        batch_size: pixels per batch, drawn with replacement.
        photograph: "both", or one of them: "temple" or "flower".
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range or unknown.
        ImportError: scikit-learn or Pillow is missing.
    """

    name = "coordinate_mlp"

    def __init__(
        self,
        encoding: str = "fourier",
        width: int = 32,
        depth: int = 2,
        features: int = 16,
        frequency: float = 3.0,
        size: int = 32,
        batch_size: int = 128,
        photograph: str = "both",
        horizon: int = 300,
    ) -> None:
        choose("encoding", encoding, ENCODINGS)
        check_network(width, depth)
        if min(width, depth, features) < 1 or frequency <= 0:
            sizes = f"width={width}, depth={depth}, features={features}, frequency={frequency}"
            raise ValueError(f"sizes must be at least 1 and the frequency positive, got {sizes}")
        kept = PHOTOGRAPHS[choose("photograph", photograph, PHOTOGRAPHS)]
        self.photographs = F.avg_pool2d(to_pixels(load_photographs()[kept]), SHRINK)
        smallest = min(self.photographs.shape[2:])
        if not 4 <= size <= smallest:
            raise ValueError(f"size must be from 4 to {smallest} pixels, got {size}")
        self.size = size

        def build() -> nn.Module:
            if encoding == "fourier":
                mlp = build_mlp([2 * features, *[width] * depth, 3], "relu")
                return nn.Sequential(Fourier(features, frequency), mlp)
            widths = [2, *[width] * depth]
            layers = [Sine(a, b, frequency, first=i == 0) for i, (a, b) in enumerate(pairwise(widths))]
            return nn.Sequential(*layers, nn.Linear(width, 3))

        super().__init__(build, F.mse_loss, _divide_pixels(size), batch_size, horizon)

    def to(self: Coordinates, device: torch.device | str) -> Coordinates:
        self.photographs = self.photographs.to(device)
        return super().to(device)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        ranges = [self.photographs.shape[0], *(n - self.size + 1 for n in self.photographs.shape[2:])]
        return {"place": torch.stack([torch.randint(high, (), generator=generator) for high in ranges])}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return self._look_up(tasks, super().batch(tasks, seeds, split))

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        return self._look_up(tasks, cast(Batch, super().full_batch(tasks, count, split)))

    def _look_up(self, tasks: Task, batch: Batch) -> Batch:
        """The batch with colours instead of the pixels' numbers in a cut-out `[T, B]`."""
        photograph, row, column = tasks["place"].unsqueeze(-1).unbind(1)
        rows = row + batch["y"].div(self.size, rounding_mode="floor")
        return {"x": batch["x"], "y": self.photographs[photograph, :, rows, column + batch["y"] % self.size]}

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return {"psnr": -10 * self.loss(params, batch).log10()}


def _divide_pixels(size: int) -> dict[str, Data]:
    """Coordinates `[n, 2]` and numbers `[n]` of the pixels of a square, 70 % train and 10 % for each other split."""
    number = torch.randperm(size**2, generator=make_generator(derive_seeds(0, "splits")))
    column, row = number % size, number // size
    x = (torch.stack([column, row], 1).float() + 0.5) / size * 2 - 1
    held_out = size**2 // 10
    places = torch.split(torch.arange(size**2), [size**2 - 3 * held_out, held_out, held_out, held_out])
    return {split: (x[i], number[i]) for split, i in zip(SPLITS, places, strict=True)}
