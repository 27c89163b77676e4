"""What a step allocates beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations made while the mode was on, as long as something holds them.

    What a kernel allocates and frees inside of one operation is not seen.

    Args:
        known: storages that were there before.
    Attributes:
        peak: most bytes alive after any operation.
        calls: operations.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.alive[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def measure_allocations(step: Callable[[], object], held: list[Tensor], device: torch.device) -> tuple[int, int]:
    """Peak bytes allocated during one step beyond `held`, and how many ATen operations it called.

    On a GPU the bytes are the caching allocator's, with all that kernels allocate.
    """
    references = [StorageWeakRef(x.untyped_storage()) for x in held]  # held here, so that no address is used again
    with Allocations({reference.cdata for reference in references}) as allocations:
        if device.type != "cuda":
            step()
            return allocations.peak, allocations.calls
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, allocations.calls
