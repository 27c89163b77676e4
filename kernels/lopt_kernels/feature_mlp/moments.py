"""Moments of a parameter and of its accumulators, which VeLO's schedule looks at: one row of nine numbers per tensor.

Source: Metz et al. 2022, arXiv 2211.09760. In float64, as variances are differences of these.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopt_kernels.feature_mlp import samples
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import TRITON_TYPES, constant, table_kernel, tl, triton
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize
from lopt_kernels.launching.segments import ALIGNMENT, Segment, Segments, by_elements, find_row, load_pointer, load_size

BLOCK, STEPS = 512, 16  # elements that a program takes at once, and how often
MOMENTA = 3
NAMES = ("p2", "m 1", "m 2", "m 3", "m2 1", "m2 2", "m2 3", "v", "v2")
ROWS = 128  # of the buffer that the second launch takes at once
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
COLUMNS = 6  # p, m, v | elements | index, slot


def reference(t: Tensors) -> Tensor:
    """Means `[9]` of p^2, the three momenta, their squares, the second moment and its square, in this order; float64.

    Of an empty parameter they are 0. The definition of both kernels; pure.
    """
    assert t.v is not None, "there are second moments"
    p, m, v = t.p.double().flatten(), t.m.double().flatten(1), t.v.double().flatten()
    rows = torch.stack([p.square(), *m, *m.square(), v, v.square()])
    return rows.sum(1) / max(1, p.numel())


def make_segment(t: Tensors, index: int) -> Segment:
    """A parameter's segment for `launch_segments`: pointers to p, momenta and second moment, and their length.

    Args:
        t: of a family with second moments.
        index: the parameter's number.
    """
    assert t.v is not None, "there are second moments"
    return Segment((t.p, t.m, t.v), (t.p.numel(),), index)


MOMENTA_, MOMENTS_ = constant(MOMENTA), constant(len(NAMES))


@table_kernel
def _moments_kernel(
    table,  # int64 [n, COLUMNS]
    starts,  # int64 [n + 1]
    num_segments,  # n
    partial_ptr,  # float64 [blocks, 9]
    P_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    p, m = load_pointer(row, 0, P_TYPE, ALIGN), load_pointer(row, 1, tl.float32, ALIGN)
    v, count = load_pointer(row, 2, tl.float32, ALIGN), load_size(row, 3, 1)
    sums = ()
    for _ in tl.static_range(MOMENTS_):
        sums = sums + (tl.zeros([BLOCK], tl.float64),)
    for step in range(STEPS):
        at = (local * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = at < count
        x = tl.load(p + at, mask, 0.0).to(tl.float64)
        rows = (x * x,)
        squares = ()
        for i in tl.static_range(MOMENTA_):
            x = tl.load(m + i * count + at, mask, 0.0).to(tl.float64)
            rows = rows + (x,)
            squares = squares + (x * x,)
        x = tl.load(v + at, mask, 0.0).to(tl.float64)
        rows = rows + squares + (x, x * x)
        new = ()
        for i in tl.static_range(MOMENTS_):
            new = new + (sums[i] + rows[i],)
        sums = new
    for i in tl.static_range(MOMENTS_):
        tl.store(partial_ptr + block.to(tl.int64) * MOMENTS_ + i, tl.sum(sums[i]))


@table_kernel
def _means_kernel(
    table, starts, partial_ptr, means_ptr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):  # means [n, 9]
    segment = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    column = tl.arange(0, PADDED)
    total = tl.zeros([ROWS, PADDED], tl.float64)
    for start in range(begin, end, ROWS):
        block = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (block < end)[:, None] & (column < MOMENTS_)
        total += tl.load(partial_ptr + (block * MOMENTS_)[:, None] + column, mask, 0.0)
    count = tl.maximum(tl.load(table + segment * COLUMNS + 3), 1).to(tl.float64)
    tl.store(means_ptr + segment * MOMENTS_ + column, tl.sum(total, axis=0) / count, column < MOMENTS_)


def launch_segments(segments: Segments) -> Tensor:
    """`reference` for all segments in two launches: float64 `[n, 9]`.

    Args:
        segments: of `make_segment`, cut by `by_elements(BLOCK * STEPS)`.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    check_triton("moments", segments.table.device)
    table, device = (segments.table, segments.starts), segments.table.device
    n, blocks = segments.num_segments, segments.num_blocks
    partial = torch.empty(blocks, len(NAMES), dtype=torch.float64, device=device)
    means = torch.empty(n, len(NAMES), dtype=torch.float64, device=device)
    with torch.cuda.device_of(means):
        if blocks:
            constexprs = _constexprs(segments.dtypes[0], segments.align)
            _moments_kernel[(blocks,)](*table, n, partial, **constexprs, **OPTIONS)
        padded = triton.next_power_of_2(len(NAMES))
        _means_kernel[(n,)](*table, partial, means, COLUMNS, padded, ROWS, **OPTIONS)
    return means


def _constexprs(p_dtype: torch.dtype, align: int) -> dict[str, Any]:
    return {"P_TYPE": TRITON_TYPES[p_dtype], "ALIGN": align, "COLUMNS": COLUMNS, "BLOCK": BLOCK, "STEPS": STEPS}


def launch(group: Sequence[Tensors]) -> list[Tensor]:
    """`reference` of every parameter of a group in Triton: a row `[9]` in float64 for each; for tests and benchmarks.

    Args:
        group: at least one, all parameters of one dtype.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    segments = Segments([make_segment(t, i) for i, t in enumerate(group)], by_elements(BLOCK * STEPS))
    return list(launch_segments(segments).unbind())


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: a matrix and a vector, which have so many elements together.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the parameters.
    """
    shapes = samples.divide_coordinates(num_coordinates)
    return {"group": samples.draw_group(shapes, Family(), generator, dtype, device)}


def bytes_moved(num_coordinates: int, param_bytes: int = 4) -> int:
    """Bytes one launch has to read: the parameter, three momenta and the second moment.

    Partial sums, nine numbers per program, are left out.

    Args:
        param_bytes: the size of one number of the parameter.
    """
    return num_coordinates * (param_bytes + 4 * (MOMENTA + 1))


def compile_source(dtype: torch.dtype) -> CompileSource:
    """The first kernel, which reads all elements, specialised to parameters of `dtype`, aligned as in a large model.

    The second one adds up its sums, and is left out.
    """
    return specialize(_moments_kernel, _constexprs(dtype, ALIGNMENT), OPTIONS, **parameters.TYPES, partial_ptr="*fp64")


OP = make_op(__name__)
