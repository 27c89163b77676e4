"""A stand-in for CUDA graphs: operations are recorded with the memory they use, and repeated without running Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made


def record(work: Callable[[], None]) -> Callable[[], None]:
    """What repeats all operations of `work`, each into the memory that its results had; `work` is done twice before."""
    work()
    with _Recorder() as recorder:
        work()

    @torch.no_grad()
    def repeat() -> None:
        for function, args, kwargs, made in recorder.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)

    return repeat
