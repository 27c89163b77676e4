"""The write of parameters whose steps are scaled to unit size, per tensor or per matrix of a tensor.

Source: Celo2, ICLR 2026, arXiv 2602.19142. The step is there already, in memory of its own: its size is known after one
pass over it, and a second one moves the parameter.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lopt_kernels.feature_mlp.table import Tensors, divide_groups, join_groups
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, store_parameter
from lopt_kernels.launching.segments import (
    ALIGNMENT,
    Segment,
    Segments,
    by_elements,
    find_row,
    load_index,
    load_pointer,
    load_size,
)

BLOCK = 2048  # elements per program
COLUMNS = 8  # parameter | elements, groups, group, inner, place of the step | index, slot
ROWS = 1024  # blocks' sums at once
STATE_DTYPES = (torch.float32,)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
EPS = 1e-9  # added to the mean square of a step


def reference(
    p: Tensor, delta: Tensor, rates: Rates, scale: float, groups: int = 1, inner: int = 1, seeds: Tensor | None = None
) -> Tensor:
    """The new parameter `[*shape]`; pure.

    Args:
        p: float32, bfloat16 or float16.
        delta: the step, float32 `[*shape]`.
        rates: `[1]` each.
        scale: root mean square of the step that is made.
        groups, inner: see `table.Tensors`.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random.
    """
    t = Tensors(p, p, p, groups=groups, inner=inner)
    x = divide_groups(delta[None], t)[0]
    size = x.square().sum(1, keepdim=True) / max(1, x.shape[1])
    step = join_groups(x * (scale * (size + EPS).rsqrt()), t)
    return parameters.move_parameter(p.flatten(), step.flatten(), rates, seeds).view(p.shape)


def make_segments(p: Tensor, index: int, place: int, groups: int = 1, inner: int = 1) -> list[Segment]:
    """A parameter's segments for `launch_segments`, one for each group whose step is scaled to unit size.

    Args:
        index: the parameter's number among the items.
        place: where its step begins in the buffer of steps.
        groups, inner: see `table.Tensors`; groups 1: the tensor is scaled as a whole.
    """
    return [Segment((p,), (p.numel() // groups, groups, group, inner, place), index) for group in range(groups)]


EPS_ = constant(EPS)


@jit
def _find_elements(row, local, BLOCK: tl.constexpr):
    element = local * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    at, groups = element, load_size(row, 2, 1)
    if groups > 1:
        group, inner = load_size(row, 3, 1), load_size(row, 4, 1)
        at = element // inner * (groups * inner) + group * inner + element % inner
    return at, element < load_size(row, 1, 1)


@table_kernel
def _squares_kernel(
    table,  # int64 [n, COLUMNS]
    starts,  # int64 [n + 1]
    num_segments,  # n
    steps_ptr,  # of all parameters
    partial_ptr,  # [blocks]
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    at, mask = _find_elements(row, local, BLOCK)
    x = tl.load(steps_ptr + load_size(row, 5, 1) + at, mask, 0.0)
    tl.store(partial_ptr + block, tl.sum(x * x))


@table_kernel
def _factors_kernel(
    table, starts, partial_ptr, factors_ptr, scale, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # factors [n]
    segment = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        total += tl.load(partial_ptr + at, at < end, 0.0)
    count = tl.maximum(tl.load(table + segment * COLUMNS + 1), 1).to(tl.float32)
    tl.store(factors_ptr + segment, scale * tl.rsqrt(tl.sum(total) / count + EPS_))


@table_kernel
def _scaled_move_kernel(
    table,
    starts,
    num_segments,
    steps_ptr,
    factors_ptr,  # [n]
    lr_ptr,  # [items], as all that follow
    decay_ptr,
    live_ptr,
    seeds,  # or None
    P_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    index = load_index(row, COLUMNS)
    if tl.load(live_ptr + index):
        at, mask = _find_elements(row, local, BLOCK)
        p = load_pointer(row, 0, P_TYPE, ALIGN)
        delta = tl.load(steps_ptr + load_size(row, 5, 1) + at, mask, 0.0) * tl.load(factors_ptr + segment)
        base = tl.load(p + at, mask, 0.0).to(tl.float32)
        lr, decay = tl.load(lr_ptr + index), tl.load(decay_ptr + index)
        store_parameter(p, at, mask, base, delta, lr, decay, seeds, index)


def launch_segments(segments: Segments, steps: Tensor, items: Items, scale: float) -> None:
    """`reference` for all segments in three launches; parameters in place.

    Args:
        segments: of `make_segments`, cut by `by_elements(BLOCK)`.
        steps: of all parameters, float32.
        items: what is not live is not written.
        scale: root mean square of the steps.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    check_triton("scaled_move", segments.table.device)
    parameters.check_items("scaled_move", segments, items)
    table = (segments.table, segments.starts)
    n, blocks, p_dtype = segments.num_segments, segments.num_blocks, segments.dtypes[0]
    if blocks == 0:
        return
    partial, factors = steps.new_empty(blocks), steps.new_empty(n)
    seeds = items.seeds if p_dtype == torch.bfloat16 else None
    sizes = {"COLUMNS": COLUMNS, "BLOCK": BLOCK}
    with torch.cuda.device_of(table[0]):
        _squares_kernel[(blocks,)](*table, n, steps, partial, **sizes, **OPTIONS)
        _factors_kernel[(n,)](*table, partial, factors, scale, COLUMNS, ROWS, **OPTIONS)
        rates = (items.rates.lr, items.rates.decay, items.live, seeds)
        types = {"P_TYPE": TRITON_TYPES[p_dtype], "ALIGN": segments.align}
        _scaled_move_kernel[(blocks,)](*table, n, steps, factors, *rates, **types, **sizes, **OPTIONS)


def launch(
    p: Tensor, delta: Tensor, rates: Rates, scale: float, groups: int = 1, inner: int = 1, out: Tensor | None = None
) -> Tensor:
    """`reference` in three Triton launches, for one parameter; p stays as it is unless it is `out`.

    Args:
        p: contiguous, as are `delta` and `out`.
        rates: `[1]` each.
        groups, inner: see `table.Tensors`.
        out: what the new parameter is written to, a new tensor by default.
    """
    out = p.clone() if out is None else out.copy_(p)
    segments = Segments(make_segments(out, 0, 0, groups, inner), by_elements(BLOCK))
    launch_segments(segments, delta, parameters.make_items([out], rates), scale)
    return out


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `reference` and `launch`: a parameter and a step `[num_coordinates]`, both float32.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the step, which is float32.
    """
    p, delta = torch.randn(2, num_coordinates, generator=generator, device=generator.device, dtype=torch.float32).to(
        device
    )
    return {"p": p, "delta": delta, "rates": parameters.sample_rates(device), "scale": 1e-2}


def bytes_moved(num_coordinates: int, param_bytes: int = 4) -> int:
    """Bytes one launch has to move: the step, twice, and the parameter, twice.

    The step's size must be known before it is applied, so it is read by two passes.

    Args:
        param_bytes: the size of one number of the parameter.
    """
    return num_coordinates * (8 + 2 * param_bytes)


def compile_source(dtype: torch.dtype, p_dtype: torch.dtype = torch.float32) -> CompileSource:
    """The last kernel, which writes, specialised to parameters of `p_dtype`, rounded to nearest.

    The two that find the steps' sizes are left out.

    Args:
        dtype: of the step, which is float32.
    """
    constants: dict[str, Any] = {"P_TYPE": TRITON_TYPES[p_dtype], "ALIGN": ALIGNMENT, "COLUMNS": COLUMNS}
    return specialize(_scaled_move_kernel, constants | {"BLOCK": BLOCK, "seeds": None}, OPTIONS, **parameters.TYPES)


OP = make_op(__name__)
