"""Models that make what they have seen: an autoencoder, a variational one, denoising diffusion of points and maps."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.core.random import make_generator
from lopt.evaluation.suites import data
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import Batch, Data, SuiteTask


def rebuild(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of an autoencoder on what it reads."""
    (x,) = batch
    x = x.flatten(1)
    return F.mse_loss(model(x), x)


# -- variational -------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """A convolutional variational autoencoder of images of 16 x 16 (Kingma & Welling 2013, arXiv 1312.6114)."""

    def __init__(self, width: int = 16, codes: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 3, 2, 1), nn.ELU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ELU()),
            *(nn.Flatten(), nn.Linear(32 * width, 2 * codes)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(codes, 32 * width), nn.ELU(), nn.Unflatten(1, (2 * width, 4, 4))),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ELU(), nn.ConvTranspose2d(width, 1, 4, 2, 1)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels, and mean and log variance of the codes; evaluation takes the mean as the code."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        noise = torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else 0.0
        return self.decoder(mean + noise), mean, log_variance


def bound_evidence(model: nn.Module, batch: Batch) -> Tensor:
    """Negative evidence lower bound in nats per image."""
    x, _ = batch
    logits, mean, log_variance = model(x)
    pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    bound: Tensor = (pixels + divergence) / len(x)
    return bound


# -- diffusion ---------------------------------------------------------------------------------------------------------


def embed_times(times: Tensor, width: int) -> Tensor:
    """Sines and cosines of times `[B]` in [0, 1] at `width / 2` frequencies."""
    angles = times[:, None] * torch.logspace(0, 2.5, width // 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def add_noise(x: Tensor, generator: Generator) -> Batch:
    """Examples of denoising: noisy data, times, and the noise, under a cosine schedule (Nichol & Dhariwal 2021, arXiv
    2102.09672).
    """
    times = torch.rand(len(x), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    angle = (math.pi / 2 * times).view(-1, *[1] * (x.dim() - 1))
    return angle.cos() * x + angle.sin() * noise, times, noise


def draw_noisy(train: Batch, count: int, generator: Generator, _: float) -> Batch:
    """A batch of denoising."""
    rows = torch.randint(len(train[0]), (count,), generator=generator)
    return add_noise(train[0][rows], generator)


def predict_noise(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the noise."""
    noisy, times, noise = batch
    return F.mse_loss(model(noisy, times), noise)


class PointDenoiser(nn.Module):
    """A residual perceptron that tells noise from points of the plane."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.inward = nn.Linear(2 + 32, width)
        self.blocks = nn.ModuleList(stack_layers([width, width, width], nn.SiLU) for _ in range(depth))
        self.outward = nn.Linear(width, 2)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """`[B, 2]` and times `[B]` to `[B, 2]`."""
        h = self.inward(torch.cat([x, embed_times(times, 32)], 1))
        for block in self.blocks:
            h = h + block(F.silu(h))
        y: Tensor = self.outward(F.silu(h))
        return y


class UNet(nn.Module):
    """A U-net of two scales for maps of 16 x 16, GroupNorm, the time added to the channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.times = nn.Sequential(nn.Linear(32, 4 * width), nn.SiLU(), nn.Linear(4 * width, 3 * width))
        self.inward = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, width), nn.GroupNorm(4, 2 * width), nn.GroupNorm(4, 2 * width)])
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.outward = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        """`[B, 1, 16, 16]` and times `[B]` to the shape of the former."""
        time = self.times(embed_times(times, 32))[:, :, None, None]
        width = self.inward.out_channels
        top = F.silu(self.norms[0](self.inward(x) + time[:, :width]))
        bottom = F.silu(self.norms[1](self.down(top) + time[:, width:]))
        bottom = bottom + F.silu(self.norms[2](self.middle(bottom)))
        y: Tensor = self.outward(F.silu(self.join(torch.cat([top, self.up(bottom)], 1))))
        return y


@cache
def load_points() -> Data:
    """Points of a checkerboard and of a spiral around it, of about unit variance, and held-out ones with noise."""
    generator = make_generator(13)

    def draw(count: int) -> Tensor:
        u = torch.rand(3, count, generator=generator)
        column = (4 * u[0]).floor()
        row = 2 * (2 * u[1]).floor() + column % 2
        board = torch.stack([4 * u[0] - 2, row - 2 + u[2]], 1)
        angle = 2 * math.pi * u[1]
        ring = 3.2 * torch.stack([angle.cos(), angle.sin()], 1)
        return torch.where(u[2:].T < 0.2, ring, board) / 1.6

    return Data((draw(8192),), add_noise(draw(2048), generator))


@cache
def load_terrain() -> Data:
    """Patches of the elevation map, and held-out ones with noise."""
    (train,), (held_out,) = data.terrain_patches()
    return Data((train,), add_noise(held_out, make_generator(14)))


# -- development -------------------------------------------------------------------------------------------------------

TEMPLE_AUTOENCODER = SuiteTask(
    name="temple_autoencoder",
    title="autoencoder 256-128-24-128-256, ReLU, on patches of a photograph",
    architecture="autoencoder",
    data_set="photograph of a temple",
    num_steps=800,
    batch_size=64,
    build=lambda: stack_layers([256, 128, 24, 128, 256], nn.ReLU),
    load=data.temple_patches,
    loss=rebuild,
)

POINTS_DIFFUSION = SuiteTask(
    name="points_diffusion",
    title="denoising diffusion of points in the plane by a residual MLP of 3 blocks of 96",
    architecture="residual perceptron with times",
    data_set="points of a checkerboard",
    num_steps=1000,
    batch_size=128,
    build=PointDenoiser,
    load=load_points,
    loss=predict_noise,
    sample=draw_noisy,
)

# -- held out ----------------------------------------------------------------------------------------------------------

LETTERS_VAE = SuiteTask(
    name="letters_vae",
    title="convolutional VAE with 12 codes on letters",
    architecture="variational autoencoder",
    data_set="letters",
    num_steps=500,
    batch_size=32,
    build=VAE,
    load=data.letters,
    loss=bound_evidence,
)

TERRAIN_DIFFUSION = SuiteTask(
    name="terrain_diffusion",
    title="denoising diffusion of elevation maps by a U-net of 16 and 32 channels",
    architecture="U-net",
    data_set="elevation map",
    num_steps=500,
    batch_size=32,
    build=UNet,
    load=load_terrain,
    loss=predict_noise,
    sample=draw_noisy,
)
