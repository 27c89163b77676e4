"""The Triton kernels of a call, recorded once and launched again: without the checks and copies around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Keeper(TorchDispatchMode):
    """Keeps all that operations make: a kernel may have got no more than its address."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


class Recording(NamedTuple):
    """Kernels in the order in which they were launched.

    Attributes:
        result: what the call returned.
        kept: all tensors that it made.
        kernels: each with the arguments of its launch.
    """

    result: Any
    kept: list[Any]
    kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def __call__(self) -> None:
        """Launch them again, on the same memory: what they update moves on."""
        for kernel, arguments, options in self.kernels:
            kernel.run(*arguments, **options)

    def count_buffers(self, *known: Any) -> int:
        """Bytes of the tensors that the kernels were given beside those known and those of the result."""
        seen = {x.untyped_storage().data_ptr() for x in tree_leaves((known, self.result)) if isinstance(x, Tensor)}
        found = {}
        for x in tree_leaves([(arguments, options) for _, arguments, options in self.kernels]):
            if isinstance(x, Tensor):
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return sum(size for address, size in found.items() if address not in seen)


def record(call: Callable[[], Any]) -> Recording:
    """Make the call, and keep what kernels it launches."""
    kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    with Keeper() as keeper, _watch_launches(lambda *launch: kernels.append(launch)):
        result = call()
    return Recording(result, keeper.kept, kernels)


@contextmanager
def _watch_launches(tell: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Tell of every launch, in Triton's compiled and in its interpreted form."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            run = kind.run

            def watch(self: Any, *arguments: Any, run: Any = run, **options: Any) -> Any:
                tell(self, arguments, options)
                return run(self, *arguments, **options)

            stack.enter_context(patch.object(kind, "run", watch))
        yield
