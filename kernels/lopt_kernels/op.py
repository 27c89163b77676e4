"""What a fused formula is: its definition, its kernel, and what tests and benchmarks need to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CompileSource:
    """One specialisation of a kernel, as `triton.compiler.ASTSource` takes it.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type ("*fp32", "i32", "constexpr", ...).
        constexprs: the values of the constexpr arguments.
        options: of the compiler and of every launch (`num_warps`, ...).
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One fused formula.

    Attributes:
        name: the key in `OPS`.
        reference: plain PyTorch, differentiable, any leading batch dimensions: the specification.
        launch: the same values from one Triton launch, for one flat set of coordinates; takes `out=`,
            tensors in the structure of the result, to write into.
        sample: `(num_coordinates, generator, dtype, device)` -> keyword arguments of `reference` and of
            `launch`; dtype is that of the state, values are heterogeneous.
        bytes_moved: `(num_coordinates, **sizes)` -> bytes that one call has to read and write.
        compile_source: dtype of the state -> the kernel specialised to what `sample` draws.
        state_dtypes: what the state may be.
        block: coordinates per program.
        launch_segments: the same in place for all segments of a table in one launch, if the op updates parameters.
    """

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    sample: Callable[[int, torch.Generator, torch.dtype, torch.device], dict[str, Any]]
    bytes_moved: Callable[..., int]
    compile_source: Callable[[torch.dtype], CompileSource]
    state_dtypes: tuple[torch.dtype, ...]
    block: int
    launch_segments: Callable[..., Any] | None = None
