"""Named parameters as one flat tensor or as a tree: how tasks and rules hand them to each other.

Tasks see one flat vector per task, which batches well; rules see tensors by name, whose shapes they may look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Params = dict[str, Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """Names and shapes of a base learner's parameters inside a flat vector of `size` numbers, in the order of the
    names.

    Attributes:
        names: of the tensors.
        shapes: unbatched, () for a scalar.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> ParamSpec:
        """The spec of some parameters, in their order.

        Args:
            params: unbatched tensors by name, such as a module's; only their shapes are looked at.
        """
        return cls(tuple(params), tuple(tuple(p.shape) for p in params.values()))

    @property
    def size(self) -> int:
        """P, the number of parameters of one task: the length of its flat vector."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each tensor, in the order of the names."""
        return [prod(shape) for shape in self.shapes]

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """One flat tensor of named ones, such as gradients.

        Args:
            params: tensors `[..., *shape]`, with the same leading dimensions for all.
        Returns:
            `[..., P]`, a copy.
        """
        pieces = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            lead = params[name].shape[: params[name].ndim - len(shape)]
            pieces.append(params[name].reshape(*lead, size))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, flat: Tensor) -> Params:
        """Named tensors of a flat one, without copying: writing to them writes to it.

        Args:
            flat: `[..., P]`.
        Returns:
            Views `[..., *shape]` by name.
        """
        pieces = torch.split(flat, self.sizes, dim=-1)
        return {
            name: piece.view((*piece.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


def stack_trees(tensors: Iterable[Mapping[str, Tensor]]) -> Params:
    """A dict of stacked tensors from several of equal keys and shapes, such as batches of many tasks or steps.

    Args:
        tensors: T dicts, at least one.
    Returns:
        Tensors `[T, ...]` by name.
    """
    items = list(tensors)
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def is_traced() -> bool:
    """Whether operations are recorded for a compiler, which fuses them: then few temporaries matter, not few calls, and
    numpy's arithmetic would be lost to the graph.
    """
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def are_plain(tensors: Iterable[Tensor], batch_ndim: int = 0, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether they are what code outside of torch can work on: of `dtypes`, on the CPU, each of the batch contiguous.

    Args:
        batch_ndim: leading dimensions that may have any strides.
    """
    for x in tensors:
        if x.dtype not in dtypes or not x.is_cpu or type(x) not in (Tensor, torch.nn.Parameter):
            return False
        if not (x.is_contiguous() or (batch_ndim > 0 and x[(0,) * batch_ndim].is_contiguous())):
            return False
    return True


@contextmanager
def in_float32() -> Iterator[None]:
    """Build and run users' own code, or such as theirs, as under torch's usual default dtype, whatever that is now."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
