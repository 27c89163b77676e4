"""Row and column means of g^2: the factored second moments of Adafactor, for tensors of any number of dimensions.

Source: Shazeer & Stern 2018, arXiv 1804.04235, as small_fc_lopt uses it (Metz et al. 2022, arXiv 2203.11860).

A mean over one axis reads the tensor as `[X, K, Y]`, K the axis: one segment. K is cut into chunks whose sums meet in a
buffer and are added up in a second launch, in a fixed order: two runs are equal bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels import apply, features
from lopt_kernels.apply import Terms
from lopt_kernels.features import Family, Tensors
from lopt_kernels.op import CompileSource, Op, specialize
from lopt_kernels.segments import ALIGNMENT, Segment, Segments, by_elements

try:
    import triton
    import triton.language as tl

    from lopt_kernels.apply import load_gradient
    from lopt_kernels.features import clip
    from lopt_kernels.segments import TRITON_TYPES, find_row, load_pointer, load_size
except ImportError:  # the reference needs torch only
    triton = None

OUTPUTS, DEPTH = 32, 64  # a program's tile: means, and elements of each that it takes at once
CHUNK = 1024  # elements of a mean that a program sums
BLOCK = 256  # means per program of the second launch
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
COLUMNS = 8  # of the table: g | number of means, K, Y, chunks, offsets in the buffer and in the means | index


class Lines(NamedTuple):
    """The means of a group: what is launched, and where the results are.

    Attributes:
        segments, sums: tables of the two launches, of two segments per tensor.
        partial: buffer between them.
        means: `[all means of the group]`, written by every launch.
        views: for each tensor its means over D2 and over D1, `[*shape with 1 there]` each, in `means`.
    """

    segments: Segments
    sums: Segments
    partial: Tensor
    means: Tensor
    views: list[tuple[Tensor, Tensor]]


def reference(t: Tensors, terms: Terms, family: Family, sanitize: bool = False) -> tuple[Tensor, Tensor]:
    """One parameter's part of the launch; pure.

    Args:
        terms: `[1]` each; the gradient's factor is used.
        sanitize: entries of g that are not finite count as 0.
    Returns:
        Means of g^2 + 1e-30 over D2 and over D1, `[*shape with 1 there]`.
    """
    assert t.axes is not None, "a vector has no lines"
    g = features.clip_gradient(apply.read_gradient(t.g, terms, sanitize), family)
    square = g.square() + features.SQUARE_EPS
    one, two = (square.sum(axis, keepdim=True) / max(1, square.shape[axis]) for axis in (t.axes[1], t.axes[0]))
    return one, two


def make_lines(group: Sequence[Tensors]) -> Lines:
    """Tables and buffers for a group of tensors with `axes`; they hold as long as its gradients stay where they are."""
    device = group[0].g.device
    segments, shapes = [], []
    start = place = 0
    for t in group:
        assert t.axes is not None, "a vector has no lines"
        shape = tuple(t.g.shape)
        for axis in (t.axes[1], t.axes[0]):
            count, chunks = prod(shape[:axis]) * prod(shape[axis + 1 :]), -(-shape[axis] // CHUNK)
            sizes = (count, shape[axis], prod(shape[axis + 1 :]), max(1, chunks), start, place)
            segments.append(Segment((t.g,), sizes))
            shapes.append((*shape[:axis], 1, *shape[axis + 1 :]))
            start, place = start + count * max(1, chunks), place + count
    means = torch.empty(place, device=device)
    views = [part.view(shape) for part, shape in zip(means.split([prod(s) for s in shapes]), shapes, strict=True)]
    pairs = list(zip(views[::2], views[1::2], strict=True))
    partial = torch.empty(start, device=device)
    tiles = Segments(segments, lambda sizes: -(-sizes[0] // OUTPUTS) * sizes[3])
    return Lines(tiles, Segments(segments, by_elements(BLOCK)), partial, means, pairs)


if triton is not None:
    SQUARE_EPS_ = tl.constexpr(features.SQUARE_EPS)

    @triton.jit
    def _square(g, at, mask, scale, BOUND: tl.constexpr, SANITIZE: tl.constexpr):
        x = clip(load_gradient(g, at, mask, scale, SANITIZE), BOUND)
        return tl.where(mask, x * x + SQUARE_EPS_, 0.0)

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _lines_kernel(
        table,  # int64 [n, COLUMNS]
        starts,  # int64 [n + 1]
        num_segments,  # n
        grad_scale_ptr,  # [n]
        partial_ptr,
        G_TYPE: tl.constexpr,
        ALIGN: tl.constexpr,
        COLUMNS: tl.constexpr,
        BOUND: tl.constexpr,
        SANITIZE: tl.constexpr,
        OUTPUTS: tl.constexpr,
        DEPTH: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        segment, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
        g, scale = load_pointer(row, 0, G_TYPE, ALIGN), tl.load(grad_scale_ptr + segment)
        count, length, inner = load_size(row, 1, 1), load_size(row, 2, 1), load_size(row, 3, 1)
        chunks = load_size(row, 4, 1)
        first = local % chunks * CHUNK
        last = tl.minimum(first + CHUNK, length)
        mean = local // chunks * OUTPUTS + tl.arange(0, OUTPUTS).to(tl.int64)
        depth = tl.arange(0, DEPTH).to(tl.int64)
        out = partial_ptr + load_size(row, 5, 1) + local % chunks * count + mean
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

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _mean_kernel(
        table,
        starts,
        num_segments,
        partial_ptr,
        means_ptr,
        COLUMNS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        _, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
        count, length, chunks = load_size(row, 1, 1), load_size(row, 2, 1), load_size(row, 4, 1)
        mean = local * BLOCK + tl.arange(0, BLOCK)
        partial = partial_ptr + load_size(row, 5, 1) + mean
        total = tl.zeros([BLOCK], tl.float32)
        for chunk in range(chunks):
            total += tl.load(partial + chunk * count, mean < count, 0.0)
        divisor = tl.maximum(length, 1).to(tl.float32)
        tl.store(means_ptr + load_size(row, 6, 1) + mean, total / divisor, mean < count)


def launch_segments(lines: Lines, terms: Terms, family: Family, sanitize: bool = False) -> None:
    """`reference` for all tensors in two launches; the means go to `lines.means`.

    Args:
        lines: of `make_lines`.
        terms: float32 `[tensors]` each.
        sanitize: see `reference`.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    segments = lines.segments
    terms = Terms(*(x.repeat_interleave(2, output_size=segments.num_segments) for x in terms))
    live = torch.ones_like(terms.lr, dtype=torch.bool)
    apply.check_launch("lines", segments, _Buffers(lines.partial[None], lines.means[None]), terms, live)
    if segments.num_blocks == 0:
        return
    with torch.cuda.device_of(segments.table):
        _lines_kernel[(segments.num_blocks,)](
            *(segments.table, segments.starts, segments.num_segments, terms.grad_scale, lines.partial),
            **_constexprs(family, segments.dtypes[0], segments.align, sanitize),
            **OPTIONS,
        )
        sums = lines.sums
        _mean_kernel[(sums.num_blocks,)](
            *(sums.table, sums.starts, sums.num_segments, lines.partial, lines.means), COLUMNS, BLOCK, **OPTIONS
        )


class _Buffers(NamedTuple):
    partial: Tensor
    means: Tensor


def _constexprs(family: Family, g_dtype: torch.dtype, align: int, sanitize: bool) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    bound = features.name_constants(family)["BOUND"]
    tile = {"OUTPUTS": OUTPUTS, "DEPTH": DEPTH, "CHUNK": CHUNK}
    types = {"G_TYPE": TRITON_TYPES[g_dtype], "ALIGN": align, "COLUMNS": COLUMNS}
    return {**types, "BOUND": bound, "SANITIZE": sanitize, **tile}


def launch(
    group: Sequence[Tensors], terms: Terms, family: Family, sanitize: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """`reference` of every tensor of a group; terms `[1]` each, of all."""
    lines = make_lines(group)
    every = Terms(*(x.expand(len(group)).contiguous() for x in terms))
    launch_segments(lines, every, family, sanitize)
    return lines.views


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: a matrix of so many elements, rounded down to rows of 64, and one of 1 column.

    Args:
        generator: numbers are drawn on its device.
        dtype: of gradients.
    """
    shapes = [features.divide_coordinates(num_coordinates)[0], (num_coordinates % 64, 1)]
    family = Family()
    group = features.draw_group(shapes, family, generator, dtype, device)
    return {"group": group, "terms": apply.sample_terms(device), "family": family}


def bytes_moved(num_coordinates: int, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: g twice, of which the second time may come from the cache."""
    return 2 * num_coordinates * grad_bytes


def compile_source(dtype: torch.dtype) -> CompileSource:
    """The kernel specialised to gradients of `dtype`."""
    constexprs = _constexprs(Family(), dtype, ALIGNMENT, sanitize=False)
    types = {"table": "*i64", "starts": "*i64", "num_segments": "i32"}
    return specialize(_lines_kernel, constexprs, OPTIONS, **types)


OP = Op(
    name="lines",
    reference=reference,
    launch=launch,
    launch_segments=launch_segments,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=(torch.float32,),
    block=BLOCK,
)
