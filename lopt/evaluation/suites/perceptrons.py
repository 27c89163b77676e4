"""Perceptrons: plain, deep without normalisation, wide, on labels that are partly wrong, in tiny batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from lopt.core.random import make_generator
from lopt.evaluation.suites import data
from lopt.evaluation.suites.task import Data, SuiteTask, classify, regress, score


def stack_layers(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A perceptron with layers of torch's default initialisation, and nothing after the last one."""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(widths):
        layers += [nn.Linear(inward, outward), activation()]
    return nn.Sequential(*layers[:-1])


# -- data that are computed --------------------------------------------------------------------------------------------


@cache
def deep_teacher() -> Data:
    """What a random network of four tanh layers makes of 16 Gaussian inputs: 2 targets, of about unit variance."""
    generator = make_generator(11)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 16, generator=generator)
        y = x
        for matrix in matrices:
            y = (1.5 * y @ matrix).tanh()
        return x, 2 * y[:, :2]

    matrices = [torch.randn(16, 16, generator=generator) / 4 for _ in range(4)]
    return Data(draw(4096), draw(512))


@cache
def arm_positions() -> Data:
    """The inverse kinematics of an arm of three links: where its hand is and how it is turned, `[n, 4]`, to the sines
    and cosines of its joints, `[n, 6]`; the middle joint bends one way only, so that there is one answer.
    """
    generator = make_generator(12)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        joints = torch.rand(count, 3, generator=generator) * torch.tensor([3.0, 2.6, 3.0]) + torch.tensor(
            [-1.5, 0.2, -1.5]
        )
        angles = joints.cumsum(1)
        reach = torch.tensor([1.0, 0.8, 0.5])
        x = torch.stack([(reach * angles.cos()).sum(1), (reach * angles.sin()).sum(1)], 1)
        turned = torch.stack([angles[:, 2].cos(), angles[:, 2].sin()], 1)
        return torch.cat([x, turned], 1), torch.cat([joints.cos(), joints.sin()], 1)

    return Data(draw(8192), draw(1024))


# -- development -------------------------------------------------------------------------------------------------------

DIGITS_MLP = SuiteTask(
    name="digits_mlp",
    title="MLP 64-128-128-10, ReLU, on digits",
    architecture="perceptron, ReLU",
    data_set="digits",
    num_steps=400,
    batch_size=64,
    build=lambda: stack_layers([64, 128, 128, 10], nn.ReLU),
    load=data.digit_vectors,
    loss=classify,
    accuracy=score,
)

NOISY_MLP = SuiteTask(
    name="noisy_mlp",
    title="wide MLP 64-1024-10, GELU, on digits of which a fifth has a random label",
    architecture="wide perceptron, GELU",
    data_set="digits",
    num_steps=800,
    batch_size=64,
    build=lambda: stack_layers([64, 1024, 10], nn.GELU),
    load=data.noisy_digit_vectors,
    loss=classify,
    accuracy=score,
)

DEEP_MLP = SuiteTask(
    name="deep_mlp",
    title="MLP of 12 hidden layers of 48, ReLU, no normalisation, on the outputs of a random network",
    architecture="deep perceptron, ReLU",
    data_set="teacher network",
    num_steps=800,
    batch_size=64,
    build=lambda: stack_layers([16, *[48] * 12, 2], nn.ReLU),
    load=deep_teacher,
    loss=regress,
)

TINY_BATCHES = SuiteTask(
    name="tiny_batches",
    title="MLP 64-96-96-10, SiLU, on digits in batches of 4",
    architecture="perceptron, SiLU",
    data_set="digits",
    num_steps=1500,
    batch_size=4,
    build=lambda: stack_layers([64, 96, 96, 10], nn.SiLU),
    load=data.digit_vectors,
    loss=classify,
    accuracy=score,
)

# -- held out ----------------------------------------------------------------------------------------------------------

LETTERS_WIDE = SuiteTask(
    name="letters_wide",
    title="wide MLP 256-768-26, sigmoid, on letters of which three tenths have a random label",
    architecture="wide perceptron, sigmoid",
    data_set="letters",
    num_steps=800,
    batch_size=64,
    build=lambda: stack_layers([256, 768, 26], nn.Sigmoid),
    load=data.noisy_letter_vectors,
    loss=classify,
    accuracy=score,
)

ARM_DEEP = SuiteTask(
    name="arm_deep",
    title="MLP of 10 hidden layers of 64, tanh, no normalisation, on the inverse kinematics of a robot's arm",
    architecture="deep perceptron, tanh",
    data_set="robot arm",
    num_steps=1000,
    batch_size=64,
    build=lambda: stack_layers([4, *[64] * 10, 6], nn.Tanh),
    load=arm_positions,
    loss=regress,
)
