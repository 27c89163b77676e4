"""Inputs for tests and benchmarks of the passes: parameters in the middle of a run, which differ in scale by orders.

Rows and columns differ in scale, too: a kernel that mixes them up does not equal its reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopt_kernels.feature_mlp.features import LINES, Family
from lopt_kernels.feature_mlp.table import Tensors


def draw_group(
    shapes: Sequence[tuple[int, ...]],
    family: Family,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensors]:
    """Parameters of these shapes in the middle of a run; the first two axes are factored, and differ in scale.

    Args:
        generator: numbers are drawn on its device.
        dtype: of parameters and gradients.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    def draw_positive(*shape: int) -> Tensor:
        return (10 ** (2 * draw(*shape) - 3)).to(device)

    group = []
    for shape in shapes:
        scale = draw(*shape)
        # a scale per index of every axis: factored averages of equal rows would hide mistakes
        for axis, size in enumerate(shape):
            scale = scale * 10 ** draw(*[size if i == axis else 1 for i in range(len(shape))])
        p, g = draw(*shape).to(device, dtype), scale.to(device, dtype)
        t = Tensors(p, g, draw(family.momenta, *shape).to(device))
        if family.factored:
            t = t._replace(v=draw_positive(*shape))
        if family.factored and len(shape) < 2:
            averages = draw_positive(LINES, *shape)
            t = t._replace(first=averages, second=averages)
        elif family.factored:
            one, two = ((LINES, *(1 if i == axis else size for i, size in enumerate(shape))) for axis in (1, 0))
            t = t._replace(first=draw_positive(*one), second=draw_positive(*two), axes=(0, 1))
            t = t._replace(first_scale=draw_positive(*one), second_scale=draw_positive(*two))
        group.append(t)
    return group


def draw_decays(family: Family, device: torch.device) -> Tensor:
    """Decays of momenta, second moment and factored moments, `[momenta + 4]`, for samples of a family.

    With six momenta they are on both sides of 0.5, where `torch.lerp` goes from one of its two formulas to the other.
    """
    # 0.5 itself, where the formulas change, and one below it
    momenta = [0.9, 0.99, 0.999, 0.5, 0.95, 0.1][: family.momenta]
    return torch.tensor([*momenta, 0.999, 0.9, 0.99, 0.999], device=device, dtype=torch.float32)


def divide_coordinates(num_coordinates: int, width: int = 64) -> list[tuple[int, ...]]:
    """Shapes of a matrix, `width` columns wide, and of a vector that have so many elements together.

    Either may be empty, so that samples reach the sizes where kernels go wrong.
    """
    return [(num_coordinates // width, width), (num_coordinates % width,)]
