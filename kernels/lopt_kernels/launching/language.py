"""Triton's language, or stand-ins where Triton is missing: the references need torch only.

Files of kernels import `jit`, `tl` and `constant` from here, so that each of them can be imported, and its reference
called, on a machine without Triton; `launching.op.check_triton` says what is missing where a kernel is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INTERPRETED", "TRITON_TYPES", "constant", "jit", "probe", "table_kernel", "tl", "triton"]

TRITON_TYPES: dict[torch.dtype, Any] = {}
if triton is not None:
    TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton.

    Args:
        function: what the decorator is put on; None where it is called with options first.
        options: of `triton.jit`.
    """
    if function is None:
        return partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


def constant(value: Any) -> Any:
    """A module's number as kernels may read it: `tl.constexpr`, which Triton wants of globals.

    Where there is no Triton, and only references run, it is the number itself.
    """
    return value if triton is None else tl.constexpr(value)


@jit
def probe() -> None:
    """A kernel that does nothing, to find out what Triton does with others.

    Its type tells whether kernels are compiled or interpreted, and its launch, by `op.try_triton`, whether this machine
    can compile at all.
    """


INTERPRETED = triton is not None and not isinstance(probe, triton.JITFunction)

# A kernel over a table of segments: the number of segments does not select a specialisation, nor does the alignment of
# what holds addresses and counts, whose numbers are read one by one.
table_kernel = partial(
    jit,
    do_not_specialize=["num_segments", "num_items", "rest_stride"],
    do_not_specialize_on_alignment=["table", "starts", "grads"],
)
