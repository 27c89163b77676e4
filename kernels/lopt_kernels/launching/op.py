"""What a fused formula is: its definition, its kernel, and what tests and benchmarks need to know of both.

Also whether Triton can run on this machine, how much shared memory it has, and how many kernels were launched.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lopt_kernels.launching.language import INTERPRETED, probe, triton


@dataclass(frozen=True)
class CompileSource:
    """One specialisation of a kernel, as `triton.compiler.ASTSource` takes it.

    Attributes:
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type ("*fp32", "i32", "constexpr", ...), or a tuple of them for a tuple.
        constexprs: the values of the constexpr arguments.
        options: of the compiler and of every launch (`num_warps`, ...).
    """

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]


def specialize(kernel: Any, constexprs: dict[str, Any], options: dict[str, Any], **types: Any) -> CompileSource:
    """A kernel with these compile-time constants, to be compiled without arguments at hand and without a GPU.

    Args:
        kernel: a `triton.jit` function.
        constexprs: by name; an argument that is None the kernel does without.
        options: of the compiler, `num_warps` among them.
        types: Triton types of other arguments by name; those without one are pointers to fp32.
    """
    # an argument that is constant here wins over a type that callers give for all kernels (`parameters.TYPES`)
    types |= dict.fromkeys(constexprs, "constexpr")
    return CompileSource(kernel, {name: types.get(name, "*fp32") for name in kernel.arg_names}, constexprs, options)


def check_triton(op: str, device: torch.device) -> None:
    """There is something to run a kernel on.

    Args:
        op: its name, for the message.
        device: of its tensors.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    if triton is None:
        raise RuntimeError(f"{op} kernel: Triton is not installed. Install it, or use the reference.")
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"{op} kernel: tensors are on {device} and Triton needs a GPU. Use the reference, or set "
            "TRITON_INTERPRET=1 before triton is imported."
        )


@cache
def try_triton(device: torch.device) -> str | None:
    """Why kernels cannot be compiled and launched on a device, found out by one that does nothing; None if they can.

    Triton needs a C compiler, the headers of Python and a GPU that it knows, of which a machine may have none.
    """
    try:
        check_triton("optimizer", device)
        with torch.cuda.device_of(torch.empty(0, device=device, dtype=torch.float32)):
            probe[(1,)]()
    except Exception as error:  # whatever it is, ordinary operations go on
        return f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)
    return None


def find_shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a program on this device may take; None: they are not limited, by the interpreter.

    Networks are run by a kernel only if `tiling.count_shared` of them is not more; else the step falls back to PyTorch.
    """
    if triton is None or device.type != "cuda":
        return None
    # "cuda" without a number is whichever device is current
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@dataclass(frozen=True)
class Op:
    """One fused formula; those of `GROUP_OPS` take a group of parameters where others take flat coordinates.

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
        launch_segments: the same in place for all segments of a table in one launch, if the op takes one.
        formula: what an elementwise op is made of, see `lopt_kernels.elementwise.formula`.
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
    formula: Any = None


def make_op(module: str, **others: Any) -> Op:
    """The op of a file of kernels, under the file's name: its functions are named as the fields of `Op`.

    Args:
        module: `__name__` of the file, which has `STATE_DTYPES` and `BLOCK`, too.
        others: fields that the file names otherwise.
    """
    names, functions = vars(sys.modules[module]), ("reference", "launch", "sample", "bytes_moved", "compile_source")
    places = {name: name for name in (*functions, "launch_segments")}
    places |= {"state_dtypes": "STATE_DTYPES", "block": "BLOCK"}
    # a file need not have all of them: ops without a table have no `launch_segments`
    fields = {field: names[name] for field, name in places.items() if name in names}
    return Op(**{"name": module.rpartition(".")[2], **fields, **others})


class LaunchCounter:
    """What `count_launches` counts.

    Attributes:
        launches: kernels of Triton, compiled or interpreted, that were launched while it counted; operations of torch
            are none of them.
    """

    launches = 0


@contextmanager
def count_launches() -> Iterator[LaunchCounter]:
    """Count launches of Triton's kernels within this context, compiled or interpreted.

    Tests hold by it that a step's launches do not grow with the number of tensors. Yields a counter that goes on
    counting until the end; without Triton it stays 0.
    """
    counter = LaunchCounter()
    if triton is None:
        yield counter
        return
    # all kernels are of probe's class, whether compiled or interpreted, and every launch goes through its `run`
    kind = type(probe)
    original = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.launches += 1
        return original(self, *args, **kwargs)

    kind.run = run
    try:
        yield counter
    finally:
        kind.run = original
