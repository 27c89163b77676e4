"""Small convolutional networks that classify images.

Source: Andrychowicz et al. 2016, arXiv 1606.04474, section 3.3 (three convolutions and a linear layer, there on
CIFAR-10 with pooling and batch normalisation). Differs from the source: strides instead of pooling, no normalisation.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn import functional as F

from lopt.tasks.data.images import ImageTask, count_classes
from lopt.tasks.data.splits import load_images
from lopt.tasks.mlp import ACTIVATIONS, check_network


class Conv(ImageTask):
    """3 x 3 convolutions of stride 2, a linear layer on all that is left, cross-entropy; torch's initialisation.

    Mini-batches are images x `[T, batch_size, channels, height, width]` float32 in [0, 1] and classes y
    `[T, batch_size]` int64. A metric is the accuracy. On digits and by default 1,898 parameters.

    Args:
        width: channels of the first convolution; each further one doubles them.
        depth: number of convolutions; each halves height and width, which must not fall below 1.
        activation: one of `ACTIVATIONS`.
        batch_size: images per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        data: "digits", "patches", "mnist:FOLDER" or "cifar10:FOLDER", read by `load_images`.
    Raises:
        ValueError: an option is out of range or unknown, the images are too small for `depth`, or `data` is not what it
            should be.
        FileNotFoundError: a file of `data` is missing.
    """

    name = "conv"

    def __init__(
        self,
        width: int = 8,
        depth: int = 2,
        activation: str = "relu",
        batch_size: int = 64,
        horizon: int = 200,
        data: str = "digits",
    ) -> None:
        check_network(width, depth, activation)
        images = load_images(data)
        channels, height, side = images["train"][0].shape[1:]
        if 2**depth > min(height, side):
            raise ValueError(f"depth {depth} is too much for {height} x {side} pixels, each layer halves them")
        widths = [channels, *(width * 2**i for i in range(depth))]
        places = 1
        for size in (height, side):
            for _ in range(depth):
                size = (size + 1) // 2
            places *= size

        def build() -> nn.Module:
            layers: list[nn.Module] = []
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * places, count_classes(images)))

        super().__init__(build, F.cross_entropy, images, batch_size, horizon)
