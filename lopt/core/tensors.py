"""Named parameters as one flat tensor or as a tree: how tasks and rules hand them to each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Params = dict[str, Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """Names and shapes of a base learner's parameters inside a flat vector of `size` numbers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> ParamSpec:
        """The spec of unbatched `params`, in their order."""
        return cls(tuple(params), tuple(tuple(p.shape) for p in params.values()))

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(prod(shape) for shape in self.shapes)

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """One `[..., P]` tensor from tensors `[..., *shape]`; copies."""
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            lead = params[name].shape[: params[name].ndim - len(shape)]
            parts.append(params[name].reshape(*lead, prod(shape)))
        return torch.cat(parts, dim=-1)

    def unflatten(self, flat: Tensor) -> Params:
        """Views `[..., *shape]` of a flat `[..., P]` tensor."""
        pieces = torch.split(flat, [prod(shape) for shape in self.shapes], dim=-1)
        return {
            name: piece.view((*piece.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


def stack_trees(tensors: Iterable[Mapping[str, Tensor]]) -> Params:
    """A dict of `[T, ...]` tensors from T dicts of equal keys and shapes."""
    items = list(tensors)
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def is_traced() -> bool:
    """Whether operations are recorded for a compiler, which fuses them: then few temporaries matter, not few calls."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None
