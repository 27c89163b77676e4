"""Autoencoders of images: networks that reproduce their input through a narrow code.

Source: a family of Metz et al. 2022, arXiv 2211.09760 (VeLO), appendix on tasks: multi-layer perceptrons that reproduce
flattened images, mean squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.tensors import Params
from lopt.tasks.base import Batch
from lopt.tasks.data.images import ImageTask, flatten_images
from lopt.tasks.data.splits import load_images
from lopt.tasks.mlp import build_mlp, check_network


class Autoencoder(ImageTask):
    """pixels-width-code-width-pixels, mean squared error over pixels in [0, 1].

    Mini-batches are images x `[T, batch_size, pixels]` float32; their classes y are there and not used. A metric is the
    "mse", which is the loss itself. The best constant output has the variance of the pixels: 0.073 on digits. On digits
    and by default 4,744 parameters.

    Args:
        width: units of every hidden layer but the code.
        code: units of the code.
        depth: hidden layers on each side of the code.
        activation: one of `ACTIVATIONS`; the code is linear.
        batch_size: images per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        data: "digits", "patches", "mnist:FOLDER" or "cifar10:FOLDER", read by `load_images`.
    Raises:
        ValueError: an option is out of range or unknown, or `data` is not what it should be.
        FileNotFoundError: a file of `data` is missing.
    """

    name = "autoencoder"
    examples = ("x",)

    def __init__(
        self,
        width: int = 32,
        code: int = 8,
        depth: int = 1,
        activation: str = "relu",
        batch_size: int = 64,
        horizon: int = 200,
        data: str = "digits",
    ) -> None:
        check_network(width, depth, activation)
        if code < 1:
            raise ValueError(f"code must be at least 1, got {code}")
        images = flatten_images(load_images(data))
        pixels = images["train"][0].shape[1]

        def build() -> torch.nn.Module:
            encoder = build_mlp([pixels, *[width] * depth, code], activation)
            decoder = build_mlp([code, *[width] * depth, pixels], activation)
            return torch.nn.Sequential(encoder, decoder)

        super().__init__(build, F.mse_loss, images, batch_size, horizon)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return F.mse_loss(functional_call(self.module, params, (batch["x"],)), batch["x"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return {"mse": self.loss(params, batch)}
