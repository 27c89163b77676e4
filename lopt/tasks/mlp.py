"""Multi-layer perceptrons that classify images, by default scikit-learn's digits: 1,797 real 8 x 8 images, no download.

Source: Andrychowicz et al. 2016, section 3.2 (an MLP with 20 sigmoid units, batch 128, 100 steps; there on MNIST).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.tasks.base import Task
from lopt.tasks.data.images import ImageTask, count_classes, flatten_images
from lopt.tasks.data.splits import load_images

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
}

MAX_WIDTH, MAX_DEPTH = 100_000, 1000
"""Beyond these one layer, or the list of them, would fill any machine before it could say so."""


class MLP(ImageTask):
    """A classifier pixels-width-...-classes with torch's default initialisation, cross-entropy, pixels in [0, 1].

    Tasks differ in their initial weights and in their mini-batches: x `[T, batch_size, pixels]` float32 and the classes
    y `[T, batch_size]` int64. A metric is the accuracy.

    Args:
        width: units of every hidden layer.
        depth: number of hidden layers.
        activation: one of `ACTIVATIONS`.
        batch_size: images per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        data: "digits", "patches", "mnist:FOLDER" or "cifar10:FOLDER", read by `load_images`.
        init_scale: factor on the initial weights and biases.
    Raises:
        ValueError: an option is out of range or unknown, or `data` is not what it should be.
        FileNotFoundError: a file of `data` is missing.
    """

    name = "mlp"

    def __init__(
        self,
        width: int = 20,
        depth: int = 1,
        activation: str = "sigmoid",
        batch_size: int = 128,
        horizon: int = 100,
        data: str = "digits",
        init_scale: float = 1.0,
    ) -> None:
        check_network(width, depth, activation)
        if init_scale < 0:
            raise ValueError(f"init_scale must not be negative, got {init_scale}")
        images = flatten_images(load_images(data))
        widths = [images["train"][0].shape[1], *[width] * depth, count_classes(images)]
        super().__init__(lambda: build_mlp(widths, activation), F.cross_entropy, images, batch_size, horizon)
        self.init_scale = init_scale

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {name: self.init_scale * p for name, p in super().init(task, generator).items()}


def build_mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """A plain multi-layer perceptron: linear layers with an activation after all but the last, which gives the logits.

    Args:
        widths: units of the input, of every hidden layer and of the output.
        activation: one of `ACTIVATIONS`.
    Returns:
        A module that `lopt.tasks.batched` knows to batch over tasks; `[..., widths[0]]` to `[..., widths[-1]]`.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def check_network(width: int, depth: int, activation: str = "relu") -> None:
    """Refuse what `build_mlp` cannot build, by the names that users of the families with a perceptron give to options.

    Raises:
        ValueError: the activation is unknown, the width less than 1 or the depth negative, or one of them absurd.
    """
    choose("activation", activation, ACTIVATIONS)
    if not 1 <= width <= MAX_WIDTH or not 0 <= depth <= MAX_DEPTH:
        raise ValueError(
            f"width must be from 1 to {MAX_WIDTH} and depth from 0 to {MAX_DEPTH}, got {width} and {depth}"
        )
