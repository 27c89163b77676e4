"""Pictures: convolutional networks, residual ones with GroupNorm, a mixer, a transformer, and a stream that drifts."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.evaluation.suites import data
from lopt.evaluation.suites.task import Batch, Data, SuiteTask, classify, score


class Mixer(nn.Module):
    """An MLP-mixer on images of 8 x 8 (Tolstikhin et al. 2021, arXiv 2105.01601): patches of 2 x 2, mixed over places
    and over channels in turns.
    """

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, width, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.places = nn.ModuleList(_mlp(16, 32) for _ in range(depth))
        self.channels = nn.ModuleList(_mlp(width, 96) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]` of images `[B, 1, 8, 8]`."""
        x = self.cut(x).flatten(2).transpose(1, 2)
        for i, (places, channels) in enumerate(zip(self.places, self.channels, strict=True)):
            x = x + places(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(self.norms[-1](x).mean(1))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm and a way around them, as in ResNet (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inward, outward, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outward, outward, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, outward) for _ in range(2))
        self.around: nn.Module = nn.Identity()
        if stride > 1 or inward != outward:
            self.around = nn.Conv2d(inward, outward, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inward, h, w]` to `[B, outward, h / stride, w / stride]`."""
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.around(x))


def build_resnet(width: int, blocks: int = 1) -> nn.Module:
    """A small ResNet for images of 16 x 16: three stages of `blocks`, the width doubled in each."""
    stages: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.GroupNorm(4, width), nn.ReLU()]
    for stage in range(3):
        for block in range(blocks):
            inward = width * 2 ** (stage - 1) if stage and not block else width * 2**stage
            stages.append(ResidualBlock(inward, width * 2**stage, 2 if stage and not block else 1))
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, data.CLASSES)]
    return nn.Sequential(*stages, *pool)


class VisionTransformer(nn.Module):
    """A ViT on images of 16 x 16, patches of 4 x 4, with a class token (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, data.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 26]` of images `[B, 1, 16, 16]`."""
        x = self.cut(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        logits: Tensor = self.head(self.norm(self.layers(x)[:, 0]))
        return logits


def build_convnet() -> nn.Module:
    """Two convolutions with max-pooling and two dense layers, the network of many a tutorial."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def build_dilated() -> nn.Module:
    """Convolutions with growing dilation and no pooling, LeakyReLU, averaged over places before the last layer."""
    layers: list[nn.Module] = []
    for inward, outward, dilation in ((1, 16, 1), (16, 24, 2), (24, 32, 4)):
        layers += [nn.Conv2d(inward, outward, 3, 1, dilation, dilation), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, data.CLASSES))


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


# -- the stream --------------------------------------------------------------------------------------------------------

TURN = 2 * math.pi / 3
"""How far letters have turned when the stream ends."""


def turn_letters(x: Tensor, angle: float) -> Tensor:
    """Images `[n, 1, 16, 16]` turned about their middle, bilinear."""
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(rotation.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def draw_turned(train: Batch, count: int, generator: Generator, progress: float) -> Batch:
    """A batch of the stream: letters that are turned the more the later they come."""
    x, y = train
    rows = torch.randint(len(y), (count,), generator=generator)
    return turn_letters(x[rows], TURN * progress), y[rows]


def load_stream() -> Data:
    """The letters; those held out are turned as they are at the end of the stream."""
    train, (x, y) = data.letters()
    return Data(train, (turn_letters(x, TURN), y))


# -- development -------------------------------------------------------------------------------------------------------

DIGITS_CONV = SuiteTask(
    name="digits_conv",
    title="convnet with max-pooling, ReLU, on digits",
    architecture="convnet with max-pooling",
    data_set="digits",
    num_steps=400,
    batch_size=64,
    build=build_convnet,
    load=data.digit_images,
    loss=classify,
    accuracy=score,
)

DIGITS_MIXER = SuiteTask(
    name="digits_mixer",
    title="MLP-mixer, 3 blocks of 48 channels, LayerNorm, on digits",
    architecture="MLP-mixer",
    data_set="digits",
    num_steps=400,
    batch_size=64,
    build=Mixer,
    load=data.digit_images,
    loss=classify,
    accuracy=score,
)

# -- held out ----------------------------------------------------------------------------------------------------------

LETTERS_RESNET = SuiteTask(
    name="letters_resnet",
    title="ResNet of 3 blocks, 12 to 48 channels, GroupNorm, on letters",
    architecture="residual convnet with GroupNorm",
    data_set="letters",
    num_steps=400,
    batch_size=32,
    build=lambda: build_resnet(12),
    load=data.letters,
    loss=classify,
    accuracy=score,
)

LETTERS_VIT = SuiteTask(
    name="letters_vit",
    title="vision transformer, 3 blocks of 64 channels, on letters",
    architecture="vision transformer",
    data_set="letters",
    num_steps=500,
    batch_size=32,
    build=VisionTransformer,
    load=data.letters,
    loss=classify,
    accuracy=score,
)

LETTERS_STREAM = SuiteTask(
    name="letters_stream",
    title="convnet with dilations on a stream of letters that turn slowly by 120 degrees, in batches of 8",
    architecture="dilated convnet",
    data_set="letters",
    num_steps=1000,
    batch_size=8,
    build=build_dilated,
    load=load_stream,
    loss=classify,
    sample=draw_turned,
    accuracy=score,
)
