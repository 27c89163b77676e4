"""Multi-layer perceptrons on scikit-learn's handwritten digits: 1,797 real 8 x 8 images, no download.

Source: Andrychowicz et al. 2016, section 3.2 (an MLP with 20 sigmoid units, batch 128, 100 steps; there on MNIST).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from lopt.tasks.base import SPLITS
from lopt.tasks.module import Data, ModuleTask

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
}


class MLP(ModuleTask):
    """A classifier 64-width-...-10 with torch's default initialisation, cross-entropy, pixels in [0, 1].

    Args:
        width: units of every hidden layer.
        depth: number of hidden layers.
        activation: one of `ACTIVATIONS`.
        batch_size: images per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
    """

    name = "mlp"

    def __init__(
        self,
        width: int = 20,
        depth: int = 1,
        activation: str = "sigmoid",
        batch_size: int = 128,
        horizon: int = 100,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if width < 1 or depth < 0:
            raise ValueError(f"width must be >= 1 and depth >= 0, got {width} and {depth}")

        def build() -> nn.Module:
            widths = [64] + [width] * depth
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
            return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

        super().__init__(build, F.cross_entropy, load_digits(), batch_size, horizon)
        self.config = {
            "width": width,
            "depth": depth,
            "activation": activation,
            "batch_size": batch_size,
            "horizon": horizon,
        }


@cache
def load_digits() -> dict[str, Data]:
    """The digits in four splits, stratified by class: 1,437 train and 120 for each of the others.

    Returns:
        For each split images `[n, 64]` float32 in [0, 1] and classes `[n]` int64.
    Raises:
        ImportError: scikit-learn is missing (`pip install lopt[train]`).
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        message = "the digits come with scikit-learn: pip install 'lopt[train]'"
        raise ImportError(message) from error
    images, classes = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)
    parts, rest = [], torch.arange(len(y)).numpy()
    for size in (360, 240, 120):  # held out of what is left, each from the one before
        kept, rest = train_test_split(rest, test_size=size, stratify=y[rest], random_state=0)
        parts.append(torch.from_numpy(kept))
    parts.append(torch.from_numpy(rest))
    return {split: (x[i], y[i]) for split, i in zip(SPLITS, parts, strict=True)}
