"""Variational autoencoders of images: a random code, and a loss of two terms that pull against each other.

Source: Kingma & Welling 2014, arXiv 1312.6114; a family of Metz et al. 2022, arXiv 2211.09760 (VeLO).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.random import derive_seeds, draw_normal
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, branch_seeds
from lopt.tasks.data.images import ImageTask, flatten_images
from lopt.tasks.data.splits import load_images
from lopt.tasks.mlp import build_mlp, check_network

NOISE = 1
"""The branch of a batch's seeds that its noise is drawn from."""


class GaussianCode(nn.Module):
    """An encoder to means and log variances, a sample of the code, a decoder to logits: the whole network of a `VAE`.

    The noise that the sample is made of is an input, so that the module draws nothing and can be batched over tasks.

    Args:
        encoder: `[B, pixels]` to `[B, 2 code]`.
        decoder: `[B, code]` to `[B, pixels]`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, sample with the reparametrisation mean + noise * deviation, and decode.

        Args:
            x: images `[B, pixels]`.
            noise: standard normal, `[B, code]`.
        Returns:
            Logits of the pixels `[B, pixels]`, means and log variances of the code, both `[B, code]`.
        """
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


class VAE(ImageTask):
    """pixels-width-code-width-pixels; the negative evidence lower bound per pixel, in nats, with one sample of a code.

    Mini-batches are images x `[T, batch_size, pixels]`, classes y, not used, and noise `[T, batch_size, code]`, all
    float32 but the classes; whole splits have one draw of noise, the same in all tasks. Metrics are the loss's two
    terms per pixel: "reconstruction" and "divergence" of the code from a standard normal. Pixels in [0, 1] are taken as
    probabilities (cross-entropy), so the loss cannot fall below their entropy: 0.213 on digits; with constant outputs
    and an unused code it is 0.423. On digits and by default 5,008 parameters.

    Args:
        width: units of every hidden layer but the code.
        code: dimensions of the code.
        depth: hidden layers of the encoder and of the decoder.
        activation: one of `ACTIVATIONS`.
        batch_size: images per batch, drawn with replacement; their noise is drawn of the same seeds.
        horizon: steps that a task is meant to be trained for.
        data: "digits", "patches", "mnist:FOLDER" or "cifar10:FOLDER", read by `load_images`.
    Raises:
        ValueError: an option is out of range or unknown, or `data` is not what it should be.
        FileNotFoundError: a file of `data` is missing.
    """

    name = "vae"
    examples = ("x", "y", "noise")

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
        pixels, self.code = images["train"][0].shape[1], code

        def build() -> nn.Module:
            encoder = build_mlp([pixels, *[width] * depth, 2 * code], activation)
            decoder = build_mlp([code, *[width] * depth, pixels], activation)
            return GaussianCode(encoder, decoder)

        super().__init__(build, F.binary_cross_entropy_with_logits, images, batch_size, horizon)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        noise = draw_normal(branch_seeds(seeds, NOISE), self.batch_size * self.code).float()
        noise = noise.view(*seeds.shape, self.batch_size, self.code)
        return super().batch(tasks, seeds, split) | {"noise": noise}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        batch = cast(Batch, super().full_batch(tasks, count, split))
        x = batch["x"]
        seed = derive_seeds(0, "vae", SPLITS.index(split)).to(x.device)
        noise = draw_normal(seed, x.shape[1] * self.code).float().view(x.shape[1], self.code)
        return batch | {"noise": noise.expand(count, *noise.shape)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return sum(self.metrics(params, batch).values(), torch.zeros((), device=batch["x"].device, dtype=torch.float32))

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        x = batch["x"]
        logits, mean, log_variance = functional_call(self.module, params, (x, batch["noise"]))
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        return {
            "reconstruction": F.binary_cross_entropy_with_logits(logits, x),
            "divergence": divergence.mean() / x.shape[-1],
        }
