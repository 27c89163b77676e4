"""Data of a user's own as inputs and targets: what people have at hand, read into memory or refused with advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.tasks.base import SPLITS, Data

RawPairs = tuple[Any, Any] | Dataset[Any]
RawData = RawPairs | Mapping[str, RawPairs]

EXPECTED = "data must be a tuple (inputs, targets) of tensors or arrays, or a map-style Dataset of such pairs"


def read_splits(data: RawData, seed: int) -> dict[str, Data]:
    """Inputs and targets by split; a single set is divided.

    Args:
        data: as `ModuleTask` takes it.
        seed: of the division: 80 % train, the rest in three equal parts.
    Raises:
        TypeError: it is something else.
        ValueError: a split is unknown, "train" is missing, or the examples are too few or do not fit each other.
    """
    if not isinstance(data, Mapping):
        return _divide(_read_pairs(data), seed)
    splits = {choose("data's split", split, SPLITS): _read_pairs(pairs) for split, pairs in data.items()}
    if "train" not in splits:
        raise ValueError(f"data has splits {sorted(splits)} but no 'train'")
    return splits


def find_not_finite(data: Data) -> Tensor:
    """The numbers of the examples that have NaN or infinity in their inputs or targets, int64 `[k]`."""
    marks = [~v.flatten(1).isfinite().all(1) for v in (x.reshape(len(x), -1) for x in data) if v.is_floating_point()]
    return torch.stack(marks).any(0).nonzero().flatten() if marks else torch.empty(0, dtype=torch.int64)


def _read_pairs(data: Any) -> Data:
    """Inputs and targets of equal length, reading a `Dataset` once."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise TypeError(f"{EXPECTED}, got a tuple of {len(data)} entries: join several inputs to one tensor")
        x, y = (_as_tensor(part, name) for part, name in zip(data, ("inputs", "targets"), strict=True))
    else:
        x, y = _read_rows(data)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"data needs as many inputs as targets, at least one, got {len(x)} and {len(y)}")
    if x.device != y.device:
        raise ValueError(f"data has inputs on {x.device} and targets on {y.device}: move them to one device")
    return x, y


def _read_rows(data: Any) -> Data:
    """The pairs of a map-style dataset, or of a list of them."""
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        raise TypeError(f"{EXPECTED}, got a {kind}: give its dataset (loader.dataset)")
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        raise TypeError(f"{EXPECTED}, got a list of tensors: write tuple(data), if these are inputs and targets")
    indexed = isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes, Tensor))
    if isinstance(data, (IterableDataset, Iterator)):
        raise TypeError(f"{EXPECTED}, got a {kind}, which can only be gone through: read it once, data=list(data)")
    if not indexed:
        raise TypeError(f"{EXPECTED}, got a {kind}")
    rows = [data[i] for i in range(len(data))]
    for i, row in enumerate(rows):
        if not isinstance(row, (tuple, list)) or len(row) != 2:
            found = f"a {type(row).__name__}"
            if isinstance(row, Mapping):
                found += f" with {', '.join(map(repr, islice(row, 4)))}"
            elif isinstance(row, Sized):
                found += f" of {len(row)} entries"
            raise TypeError(f"each row of data must be a pair (input, target), row {i} is {found}: choose two of them")
    if not rows:
        raise ValueError("data needs as many inputs as targets, at least one, got 0 and 0")
    x, y = (_stack([row[k] for row in rows], name) for k, name in enumerate(("inputs", "targets")))
    return x, y


def _stack(values: list[Any], name: str) -> Tensor:
    tensors = [_as_tensor(value, name, scalar=True) for value in values]
    other = next((i for i, value in enumerate(tensors) if value.shape != tensors[0].shape), None)
    if other is not None:
        raise ValueError(
            f"data must have {name} of one shape, row 0 has {list(tensors[0].shape)}, row {other} "
            f"{list(tensors[other].shape)}: pad or crop them"
        )
    return torch.stack(tensors)


def _as_tensor(value: Any, name: str, *, scalar: bool = False) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise TypeError(f"data must have {name} that are numbers in a tensor or array: {reason}") from error
    if tensor.layout != torch.strided:
        raise TypeError(f"data must have dense {name}, got {tensor.layout}: call to_dense()")
    if tensor.ndim == 0 and not scalar:
        raise TypeError(f"data must have {name} with the examples as their first dimension, got a single number")
    return tensor


def _divide(data: Data, seed: int) -> dict[str, Data]:
    """80 % train, the rest in three equal parts, by a seeded permutation."""
    x, y = data
    held_out = len(x) // 15
    if held_out == 0:
        raise ValueError(f"{len(x)} examples are too few for four splits (15 at least)")
    order = torch.randperm(len(x), generator=make_generator(derive_seeds(seed, "splits"))).to(x.device)
    sizes = [len(x) - 3 * held_out, held_out, held_out, held_out]
    return {s: (x[i], y[i]) for s, i in zip(SPLITS, torch.split(order, sizes), strict=True)}
