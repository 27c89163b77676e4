"""A device for tests on machines that have none: its tensors say that they are on "meta", and compute on the CPU.

Operations that mix them with tensors of the CPU fail as they would with those of a GPU, and what would make the CPU
wait for a GPU is written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
COPIES = ("aten::_to_copy", "aten::copy_")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::equal")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")  # by tensors of the CPU


WAITS: list[str] = []
"""What waited, since `pretend` was entered."""


class There(Tensor):
    """A tensor on the pretended device; `here` has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE, requires_grad=False
        )
        made.here = here
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values; what it makes is on the device of its operands, or on the one that is asked for."""
    name, wanted = function._schema.name, kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    if name in COPIES:
        moved = wanted is not None and (torch.device(wanted) == DEVICE) != bool(there)
        if moved or 0 < len(there) < len(tensors):
            WAITS.append(f"{name} between devices")
    elif there:
        _check_operands(name, args, tensors)
    if wanted is not None:
        kwargs = kwargs | {"device": CPU}
    here_args, here_kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    made = function(*here_args, **here_kwargs)
    if made is None:
        return None
    if "out" in kwargs:
        return kwargs["out"]
    if name.endswith("_") and not name.endswith("__"):  # in place: the same tensor comes back
        return args[0]
    to_there = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, made) if to_there else made


def _check_operands(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Those of the CPU may be single numbers, or numbers of rows; what the CPU has to read of the others is a wait."""
    strangers = [x for x in tensors if not isinstance(x, There) and x.ndim]
    if name in INDEXED and isinstance(args[0], There):
        strangers = [x for x in strangers if x.dtype == torch.bool or x is args[-1]]
    assert not strangers, f"{name} mixes devices: {[(type(x).__name__, x.shape) for x in tensors]}"
    if name in READS or (name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
        WAITS.append(name)


class _Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class _Move(TorchFunctionMode):
    """`torch.tensor` and its like make their values on the CPU, unseen by the other mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and isinstance(args[0], There):  # which torch refuses for any subclass
            WAITS.append("tolist")
            return args[0].here.tolist()
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": CPU}).to(kwargs["device"])
        return function(*args, **kwargs)


@contextmanager
def pretend() -> Iterator[torch.device]:
    """While it lasts, tensors can be made on, and moved to, the device that it gives."""
    WAITS.clear()
    with _Move(), _Pretend():
        yield DEVICE
