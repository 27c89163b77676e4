"""Row and column averages of g^2 and the factors they make: Adafactor's second moments, for any number of dimensions.

Source: Shazeer & Stern 2018, arXiv 1804.04235, as small_fc_lopt uses it (Metz et al. 2022, arXiv 2203.11860).

A mean over one axis reads the tensor as `[X, K, Y]`, K the axis: one segment. K is cut into chunks whose sums meet in a
buffer and are added up in a second launch, in a fixed order: two runs are equal bit for bit. A third launch scales the
rows by their own mean.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.feature_mlp import features, samples
from lopt_kernels.feature_mlp.features import LINES, Family, average
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, clip, load_gradient
from lopt_kernels.launching.segments import (
    ALIGNMENT,
    Segment,
    Segments,
    by_elements,
    find_row,
    load_index,
    load_pointer,
    load_size,
    load_slot,
)

OUTPUTS, DEPTH = 32, 64  # a program's tile: means, and elements of each that it takes at once
CHUNK = 1024  # elements of a mean that a program sums
BLOCK = 256  # means per program of the second launch
WIDTH, LENGTH = 8, 256  # a program's tile in the third launch: means of rows, and rows of each
STATE_DTYPES = (torch.float32,)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
COLUMNS = 12  # average, scale | means, K, Y, chunks, place in the buffer, rows?, length and inner of rows | index, slot
MEAN_EPS, SMALLEST = 1e-9, 1e-9  # added to the rows' mean, and the least that has a root


class LineAverages(NamedTuple):
    """What the pass makes of one parameter with two factored axes.

    Attributes:
        first, second: new averages of g^2 `[3, *shape with 1]`, over D2 and over D1 (see `table`).
        first_scale, second_scale: inverse roots of the same shapes, whose product is the factor F; those of rows are
            relative to the rows' mean.
    """

    first: Tensor
    second: Tensor
    first_scale: Tensor
    second_scale: Tensor


class Lines(NamedTuple):
    """The tables of the three launches, made once and kept as long as tensors stay where they are.

    Attributes:
        sums, averages, scales: two segments per parameter in each, cut as the launch needs it; in the last, rows alone
            have programs.
        buffer: numbers in the buffer of partial sums between the first two.
    """

    sums: Segments
    averages: Segments
    scales: Segments
    buffer: int


def reference(t: Tensors, decays: Tensor, rates: Rates, family: Family, sanitize: bool = False) -> LineAverages:
    """One parameter's part of the launch; pure.

    Args:
        decays: of momenta, second moment and factored moments, `[momenta + 4]`; the last three are used.
        rates: `[1]` each; the gradient's factor is used.
        sanitize: entries of g that are not finite count as 0.
    """
    assert t.axes is not None, "a vector has no lines"
    assert t.first is not None, "and a matrix has them"
    assert t.second is not None, "both"
    g = features.clip_gradient(parameters.read_gradient(t.g, rates, sanitize), family)
    square = g.square() + features.SQUARE_EPS
    decay = decays[-LINES:].reshape(-1, *[1] * g.ndim)
    lines, scales = [], []
    for i, (old, axis) in enumerate(((t.first, t.axes[1]), (t.second, t.axes[0]))):
        mean = square.sum(axis, keepdim=True) / max(1, square.shape[axis])
        line = torch.lerp(mean, old, decay)
        scale = line / (line.mean(1 + t.axes[i], keepdim=True) + MEAN_EPS) if i == t.rows else line
        lines.append(line)
        scales.append(scale.clamp(min=SMALLEST).rsqrt())
    return LineAverages(*lines, *scales)


def make_lines(group: Sequence[tuple[int, Tensors]]) -> Lines:
    """Tables of the three launches, for parameters with two factored axes.

    Args:
        group: each parameter with its number among the items; `axes` and `first` to `second_scale` are set.
    """
    segments, start = [], 0
    for index, t in group:
        assert t.axes is not None, "a vector has no lines"
        one, two = t.axes
        for i, (axis, other) in enumerate(((two, one), (one, two))):
            average, scale = (t.first, t.first_scale) if i == 0 else (t.second, t.second_scale)
            assert average is not None, "a matrix has lines"
            assert scale is not None, "and their scales"
            shape = tuple(t.p.shape)
            count, chunks = prod(shape[:axis]) * prod(shape[axis + 1 :]), max(1, -(-shape[axis] // CHUNK))
            inner = prod(size for j, size in enumerate(shape) if j > other and j != axis)
            sizes = (count, shape[axis], prod(shape[axis + 1 :]), chunks, start, int(i == t.rows), shape[other], inner)
            segments.append(Segment((average, scale), sizes, index, t.slot))
            start += count * chunks
    return Lines(
        Segments(segments, lambda sizes: -(-sizes[0] // OUTPUTS) * sizes[3]),
        Segments(segments, by_elements(BLOCK)),
        Segments(segments, lambda sizes: sizes[5] * -(-sizes[0] // (max(1, sizes[6]) * WIDTH))),
        start,
    )


SQUARE_EPS_, MEAN_EPS_, SMALLEST_ = (constant(x) for x in (features.SQUARE_EPS, MEAN_EPS, SMALLEST))
LINES_ = constant(LINES)


@jit
def _square(g, at, mask, scale, BOUND: tl.constexpr, SANITIZE: tl.constexpr):
    x = clip(load_gradient(g, at, mask, scale, SANITIZE), BOUND)
    return tl.where(mask, x * x + SQUARE_EPS_, 0.0)


@table_kernel
def _sums_kernel(
    table,  # int64 [n, COLUMNS]
    starts,  # int64 [n + 1]
    num_segments,  # n
    grads,  # [items], as the next one
    grad_scale_ptr,
    partial_ptr,
    G_TYPE: tl.constexpr,
    G_ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOUND: tl.constexpr,
    SANITIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    _, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    index = load_index(row, COLUMNS)
    g, scale = load_pointer(grads + index, 0, G_TYPE, G_ALIGN), tl.load(grad_scale_ptr + index)
    count, length, inner = load_size(row, 2, 1), load_size(row, 3, 1), load_size(row, 4, 1)
    chunks = load_size(row, 5, 1)
    first = local % chunks * CHUNK
    last = tl.minimum(first + CHUNK, length)
    mean = local // chunks * OUTPUTS + tl.arange(0, OUTPUTS).to(tl.int64)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    out = partial_ptr + load_size(row, 6, 1) + local % chunks * count + mean
    if inner == 1:  # the elements of a mean are neighbours
        wide = tl.zeros([OUTPUTS, DEPTH], tl.float32)
        for k in range(first, last, DEPTH):
            there = (mean < count)[:, None] & (k + depth < last)
            wide += _square(g, (mean * length)[:, None] + k + depth, there, scale, BOUND, SANITIZE)
        tl.store(out, tl.sum(wide, axis=1), mean < count)
    else:  # neighbours belong to different means
        start = mean // inner * (length * inner) + mean % inner
        tall = tl.zeros([DEPTH, OUTPUTS], tl.float32)
        for k in range(first, last, DEPTH):
            mask = (k + depth < last)[:, None] & (mean < count)
            tall += _square(g, ((k + depth) * inner)[:, None] + start, mask, scale, BOUND, SANITIZE)
        tl.store(out, tl.sum(tall, axis=0), mean < count)


@table_kernel
def _averages_kernel(
    table,
    starts,
    num_segments,
    live_ptr,  # [items]
    decays_ptr,  # [K, FIRST_DECAY + 3]
    partial_ptr,
    FIRST_DECAY: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    average_ptr, scale_ptr = load_pointer(row, 0, tl.float32, 1), load_pointer(row, 1, tl.float32, 1)
    count, length, chunks = load_size(row, 2, 1), load_size(row, 3, 1), load_size(row, 5, 1)
    decays = decays_ptr + load_slot(row, COLUMNS) * (FIRST_DECAY + LINES_) + FIRST_DECAY
    mean = local * BLOCK + tl.arange(0, BLOCK)
    mask = mean < tl.where(tl.load(live_ptr + load_index(row, COLUMNS)), count, 0)
    partial = partial_ptr + load_size(row, 6, 1) + mean
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        total += tl.load(partial + chunk * count, mask, 0.0)
    total = total / tl.maximum(length, 1).to(tl.float32)
    scaled_here = mean < tl.where(load_size(row, 7, 1) == 1, 0, count)  # not rows
    for i in tl.static_range(LINES_):
        new = average(tl.load(average_ptr + i * count + mean, mask, 0.0), total, tl.load(decays + i))
        tl.store(average_ptr + i * count + mean, new, mask)
        tl.store(scale_ptr + i * count + mean, _invert_root(new), mask & scaled_here)


@jit
def _invert_root(x):
    return tl.rsqrt(tl.where(x < SMALLEST_, SMALLEST_, x))  # NaN stays NaN


@table_kernel
def _scales_kernel(
    table,
    starts,
    num_segments,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
):
    _, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    average_ptr, scale_ptr = load_pointer(row, 0, tl.float32, 1), load_pointer(row, 1, tl.float32, 1)
    count, length, inner = load_size(row, 2, 1), load_size(row, 8, 1), load_size(row, 9, 1)
    column = local * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
    place = tl.arange(0, LENGTH).to(tl.int64)
    start = (column // inner * (length * inner) + column % inner)[None, :]
    inside = (column * length < count)[None, :]
    for i in tl.static_range(LINES_):
        total = tl.zeros([LENGTH, WIDTH], tl.float32)
        for k in range(0, length, LENGTH):
            mask = (k + place < length)[:, None] & inside
            total += tl.load(average_ptr + i * count + ((k + place) * inner)[:, None] + start, mask, 0.0)
        mean = tl.sum(total, axis=0) / length.to(tl.float32) + MEAN_EPS_
        for k in range(0, length, LENGTH):
            mask = (k + place < length)[:, None] & inside
            at = i * count + ((k + place) * inner)[:, None] + start
            relative = tl.load(average_ptr + at, mask, 1.0) / mean[None, :]
            tl.store(scale_ptr + at, _invert_root(relative), mask)


def launch_segments(lines: Lines, decays: Tensor, items: Items, family: Family, sanitize: bool = False) -> None:
    """`reference` for all parameters in three launches; averages in place, and their scales.

    Args:
        lines: of `make_lines`.
        decays: float32 `[K, momenta + 4]`, rows for the parameters' slots.
        items: one that is not live keeps its averages.
        sanitize: see `reference`.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    sums, averages, scales = lines.sums, lines.averages, lines.scales
    parameters.check_launch("lines", averages, {"decays": decays}, items, check_dtype=False)
    partial = torch.empty(lines.buffer, dtype=torch.float32, device=decays.device)
    with torch.cuda.device_of(decays):
        if sums.num_blocks:
            _sums_kernel[(sums.num_blocks,)](
                *(sums.table, sums.starts, sums.num_segments, items.grads, items.rates.grad_scale, partial),
                **_constexprs(family, items.dtype, items.align, sanitize),
                **OPTIONS,
            )
        if averages.num_blocks:
            _averages_kernel[(averages.num_blocks,)](
                *(averages.table, averages.starts, averages.num_segments, items.live, decays, partial),
                *(family.momenta + 1, COLUMNS, BLOCK),
                **OPTIONS,
            )
        if scales.num_blocks:
            _scales_kernel[(scales.num_blocks,)](
                *(scales.table, scales.starts, scales.num_segments, COLUMNS, WIDTH, LENGTH), **OPTIONS
            )


def _constexprs(family: Family, g_dtype: torch.dtype, align: int, sanitize: bool) -> dict[str, Any]:
    """The first kernel's compile-time constants."""
    tile = {"OUTPUTS": OUTPUTS, "DEPTH": DEPTH, "CHUNK": CHUNK}
    types = {"G_TYPE": TRITON_TYPES[g_dtype], "G_ALIGN": align, "COLUMNS": COLUMNS}
    return {**types, "BOUND": family.bound, "SANITIZE": sanitize, **tile}


def launch(
    group: Sequence[Tensors], decays: Tensor, rates: Rates, family: Family, sanitize: bool = False
) -> list[LineAverages]:
    """`reference` of every parameter of a group in Triton, which stays as it is; for tests and benchmarks.

    Args:
        group: of parameters with lines.
        decays: `[momenta + 4]`, of all.
        rates: `[1]` each, of all.
    """
    new = []
    for t in group:
        assert t.first is not None, "a matrix has lines"
        assert t.second is not None, "two"
        new.append(
            LineAverages(t.first.clone(), t.second.clone(), torch.empty_like(t.first), torch.empty_like(t.second))
        )
    copies = [t._replace(**own._asdict(), slot=0) for t, own in zip(group, new, strict=True)]
    every = Rates(*(x.expand(len(group)).contiguous() for x in rates))
    items = parameters.make_items([t.g for t in group], every)
    launch_segments(make_lines(list(enumerate(copies))), decays[None], items, family, sanitize)
    return new


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: a matrix of so many elements, rounded down to rows of 64, and one of 1 column.

    Args:
        generator: numbers are drawn on its device.
        dtype: of gradients.
    """
    shapes = [samples.divide_coordinates(num_coordinates)[0], (num_coordinates % 64, 1)]
    family = Family()
    group = samples.draw_group(shapes, family, generator, dtype, device)
    decays = samples.draw_decays(family, device)
    return {"group": group, "decays": decays, "rates": parameters.sample_rates(device), "family": family}


def bytes_moved(num_coordinates: int, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: g twice, of which the second time may come from the cache.

    Averages and scales, of which there are few, are left out.

    Args:
        grad_bytes: the size of one number of g.
    """
    return 2 * num_coordinates * grad_bytes


def compile_source(dtype: torch.dtype) -> CompileSource:
    """The first kernel, which reads all gradients, specialised to these of `dtype`, aligned as in a large model.

    The other two run over rows and columns only, and are left out.
    """
    constexprs = _constexprs(Family(), dtype, ALIGNMENT, sanitize=False)
    return specialize(_sums_kernel, constexprs, OPTIONS, **parameters.TYPES)


OP = make_op(__name__)
