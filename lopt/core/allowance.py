"""How much a foreign configuration may have torch allocate, before anything that it says has been compared."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.overrides import TorchFunctionMode

FREE_NUMBERS, FREE_CALLS = 1 << 22, 10_000
FACTORIES = frozenset({"empty", "full", "ones", "rand", "randn", "zeros"})
"""What makes a tensor of given sizes, which come first, one by one or as a list."""


class Allowance(TorchFunctionMode):
    """Within it, making tensors of more numbers than allowed fails, before there is memory for them.

    Args:
        numbers: of all the tensors that there will be; several times as many may be made, one after the other, and
            `FREE_NUMBERS` in any case.

    >>> import torch
    >>> with Allowance(10):
    ...     torch.zeros(100_000, 100_000)
    Traceback (most recent call last):
    ValueError: it asks for a tensor of [100000, 100000] numbers, which is too large
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.calls = FREE_NUMBERS + 8 * numbers, FREE_CALLS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else args
        if getattr(func, "__name__", "") in FACTORIES:
            self.numbers -= prod(size for size in sizes if isinstance(size, int))
        if self.numbers < 0 or self.calls < 0:
            raise ValueError(f"it asks for a tensor of {list(sizes)} numbers, which is too large")
        return func(*args, **(kwargs or {}))
