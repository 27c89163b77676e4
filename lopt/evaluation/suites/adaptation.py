"""Trained further or without labels: low-rank adapters of a network that was trained before, and contrastive views."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.evaluation.suites import data
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import Batch, Data, SuiteTask, classify, score
from lopt.evaluation.suites.vision import Mixer, turn_letters

# -- adapters ----------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer with a trained correction of low rank (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.frozen(x) + 2 * F.linear(F.linear(x, self.down), self.up)
        return y


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and put `LowRank` in the place of all its linear layers."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRank(child, rank))
    return model


def train_before(build: Callable[[], nn.Module], load: Callable[[], Data], num_steps: int) -> dict[str, Tensor]:
    """Weights of a classifier after some steps of Adam, always the same."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(18)
        model, (x, y) = build().double(), load().train  # in float64, so that all machines make the same
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(num_steps):
            rows = torch.randint(len(y), (64,))
            optimizer.zero_grad()
            classify(model, (x[rows].double(), y[rows])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach().float() for name, value in model.state_dict().items()}


def build_letters_base() -> nn.Module:
    """The network that was trained on upright letters."""
    return stack_layers([256, 320, 320, data.CLASSES], nn.ReLU)


@cache
def train_letters_base() -> dict[str, Tensor]:
    """Its weights."""
    return train_before(build_letters_base, data.letter_vectors, 400)


@cache
def train_digits_base() -> dict[str, Tensor]:
    """Weights of a mixer that was trained on digits."""
    return train_before(Mixer, data.digit_images, 250)


def build_letters_lora() -> nn.Module:
    """Adapters of rank 10 around the network for letters."""
    model = build_letters_base()
    model.load_state_dict(train_letters_base())
    return add_adapters(model, 10)


def build_digits_lora() -> nn.Module:
    """Adapters of rank 12 around the mixer for digits."""
    model = Mixer()
    model.load_state_dict(train_digits_base())
    return add_adapters(model, 12)


@cache
def load_lying_letters() -> Data:
    """Letters turned by a right angle, as vectors."""
    return Data(*((turn_letters(x, math.pi / 2).flatten(1), y) for x, y in data.letters()))


@cache
def load_negative_digits() -> Data:
    """Digits in black on white, mirrored."""
    return Data(*((1 - x.flip(-1), y) for x, y in data.digit_images()))


# -- contrastive -------------------------------------------------------------------------------------------------------


def build_encoder(width: int = 16) -> nn.Module:
    """Three convolutions with GroupNorm and a projection to 32 numbers."""
    layers: list[nn.Module] = []
    for inward, outward in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inward, outward, 3, 2, 1), nn.GroupNorm(4, outward), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 64), nn.GELU(), nn.Linear(64, 32))


def tell_pairs(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of telling which two views belong together, among the batch's first 64 (SimCLR, Chen et al. 2020,
    arXiv 2002.05709), temperature 0.2.
    """
    first, second = (F.normalize(model(view[:64]), dim=1) for view in batch)
    logits, wanted = first @ second.T / 0.2, torch.arange(len(first))
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def score_pairs(model: nn.Module, batch: Batch) -> Tensor:
    """Share of the first 64 views whose nearest is the right one."""
    first, second = (F.normalize(model(view[:64]), dim=1) for view in batch)
    right: Tensor = ((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean()
    return right


# -- development -------------------------------------------------------------------------------------------------------

DIGITS_LORA = SuiteTask(
    name="digits_lora",
    title="LoRA of rank 12: a mixer trained on digits learns mirrored negatives of them",
    architecture="LoRA of a mixer",
    data_set="digits",
    num_steps=400,
    batch_size=32,
    build=build_digits_lora,
    load=load_negative_digits,
    loss=classify,
    accuracy=score,
)

# -- held out ----------------------------------------------------------------------------------------------------------

LETTERS_LORA = SuiteTask(
    name="letters_lora",
    title="LoRA of rank 10: an MLP trained on upright letters learns those that lie",
    architecture="LoRA of a perceptron",
    data_set="letters",
    num_steps=800,
    batch_size=32,
    build=build_letters_lora,
    load=load_lying_letters,
    loss=classify,
    accuracy=score,
)

BRAIN_CONTRAST = SuiteTask(
    name="brain_contrast",
    title="SimCLR: a convnet tells views of places in a brain scan apart",
    architecture="contrastive convnet",
    data_set="brain scan",
    num_steps=500,
    batch_size=64,
    build=build_encoder,
    load=data.brain_scan,
    loss=tell_pairs,
    sample=data.crop_pairs,
    accuracy=score_pairs,
)
