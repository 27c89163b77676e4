"""How torch stores a parameter and how the sources of the rules see it.

The sources (learned_optimization and its descendants, in JAX) store a Linear weight as (in, out) and a convolution as
(spatial..., in, out); torch stores (out, in) and (out, in, spatial...). Which dimension counts as row or column, and
which two are "the last", is decided in the source's order and expressed here in torch's axes: nothing is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)  # no named tuple: the compiler of torch 2.10 sees no properties of these
class Layout:
    """The roles of a parameter's axes. Axes are negative, so that batch dimensions in front do not matter.

    Two or more dimensions are read as (out, in, spatial...): Linear, Embedding, Conv1d (3-D), Conv2d (4-D) and
    Conv3d (5-D). Transposed convolutions are (in, out, spatial...) in torch and are read in the same way. A scalar
    counts as a vector of one element.

    Attributes:
        shape: the parameter's shape, in torch's order; at least one dimension.
        factored: (largest, second largest) dimension, of equal ones the later in the source's order; None for vectors.
        last: the source's last two dimensions (in, out); of a vector, its only one.
    """

    shape: tuple[int, ...]
    factored: tuple[int, int] | None
    last: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether at least two dimensions are longer than 1."""
        return sum([n > 1 for n in self.shape]) >= 2  # a list: torch.compile does not take generators here

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes."""
        return tuple(range(-self.ndim, 0))


def find_layout(shape: tuple[int, ...]) -> Layout:
    """The layout of a parameter of the given torch shape.

    Layouts are cached by shape, as every step asks for them; a scalar counts as a vector of one element.
    """
    return _make_layout(shape) if torch.compiler.is_compiling() else _find_layout(shape)  # it traces through no cache


def _make_layout(shape: tuple[int, ...]) -> Layout:
    if len(shape) < 2:
        return Layout(shape or (1,), None, (-1,))
    n = len(shape)
    source = [*range(2 - n, 0), 1 - n, -n]  # spatial..., in, out
    by_size = sorted(source, key=lambda axis: shape[axis])  # stable: of equal sizes the later one counts as larger
    return Layout(shape, (by_size[-1], by_size[-2]), (1 - n, -n))


_find_layout = cache(_make_layout)
