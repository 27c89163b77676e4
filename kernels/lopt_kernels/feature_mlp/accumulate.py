"""Momenta, second moments and vectors' averages in place, and the sums of squares of the features they make.

Source: Metz et al. 2022, arXiv 2203.11860. Sums go to a buffer of one row per program; `fold` adds them up, in a fixed
order: two runs are equal bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005, SIM102, SIM109 (Triton concatenates tuples, and tests constants apart from values)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.feature_mlp import features, samples, table
from lopt_kernels.feature_mlp.features import (
    LINE_FEATURES,
    Family,
    append_lines,
    average,
    load_columns,
    load_row_features,
    load_scales,
    make_factors,
    make_features,
)
from lopt_kernels.feature_mlp.table import (
    COLUMNS,
    KIND_OF,
    NUM_KINDS,
    STRIDED,
    VECTOR,
    WIDE,
    Tensors,
    find_aligns,
    find_elements,
    find_lengths,
    find_pointers,
    find_tile,
)
from lopt_kernels.launching import parameters, tuning
from lopt_kernels.launching.language import constant, jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, clip, load_gradient
from lopt_kernels.launching.segments import ALIGNMENT, Segments, find_row, load_index, load_pointer, load_slot
from lopt_kernels.launching.tuning import Tile

TILE = Tile(block=512, steps=16, warps=4)
STATE_DTYPES = (torch.float32,)
BLOCK = TILE.block
OPTIONS = {"enable_fp_fusion": True}


class Accumulated(NamedTuple):
    """What the pass makes of one parameter: new accumulators, and the sums that `fold` normalises features by.

    Attributes:
        m: momenta `[momenta, *shape]`.
        v: second moment `[*shape]`; None in families without.
        averages: a vector's averages of g^2 `[3, *shape]`; None for others.
        squares: sums of squares of its inputs `[groups, I]`, see `Family.num_inputs`.
    """

    m: Tensor
    v: Tensor | None
    averages: Tensor | None
    squares: Tensor


def reference(t: Tensors, decays: Tensor, rates: Rates, family: Family, sanitize: bool = False) -> Accumulated:
    """One parameter's part of the launch; pure.

    Args:
        t: the lines of a matrix are the new ones.
        decays: of momenta, second moment and factored moments, `[momenta + 4]`.
        rates: `[1]` each; the gradient's factor is used.
        sanitize: entries of g that are not finite count as 0.
    """
    momentum, second, factored = decays.split([family.momenta, 1, features.LINES])
    g = features.clip_gradient(parameters.read_gradient(t.g, rates, sanitize), family)
    m = torch.lerp(g, t.m, momentum.reshape(-1, *[1] * g.ndim))
    v = None if t.v is None else torch.lerp(g.square(), t.v, second)
    averages = None
    if t.first is not None and t.axes is None:
        square = g.square() + features.SQUARE_EPS
        averages = torch.lerp(square, t.first, factored.reshape(-1, *[1] * g.ndim))
        t = t._replace(first=averages, second=averages)
    x = features.all_features(t._replace(m=m, v=v), rates, family, sanitize)
    return Accumulated(m, v, averages, x.square().sum(-1).T)


_WIDE, _STRIDED, _VECTOR = (constant(x) for x in (WIDE, STRIDED, VECTOR))
_NUM_KINDS = constant(NUM_KINDS)
_SQUARE_EPS = constant(features.SQUARE_EPS)
_LINE_FEATURES = constant(LINE_FEATURES)


@jit
def _update(pointer, at, mask, stride, value, decays, COUNT: tl.constexpr):
    """COUNT averages `stride` apart, moved towards a value and written: a tuple of the new ones; 1 where nothing is."""
    result = ()
    for i in tl.static_range(COUNT):
        new = average(tl.load(pointer + i * stride + at, mask, 1.0), value, tl.load(decays + i))
        tl.store(pointer + i * stride + at, new, mask)
        result = result + (new,)
    return result


@jit
def _update_inputs(
    g, p, pointers, columns, where, lengths, decays, KIND: tl.constexpr, FAMILY: tl.constexpr
):  # a tuple of vectors
    """The inputs that are an element's own, of accumulators that are moved and written."""
    at, mask = where[0], where[3]
    numel = lengths[0]
    m = _update(pointers[1], at, mask, numel, g, decays, FAMILY.MOMENTA)
    v, factor, factor_m, first = g, m, m, m
    if FAMILY.FACTORED:
        v = _update(pointers[2], at, mask, 0, g * g, decays + FAMILY.MOMENTA, 1)[0]
        if KIND == _VECTOR:
            first = _update(pointers[3], at, mask, numel, g * g + _SQUARE_EPS, decays + FAMILY.MOMENTA + 1, 3)
            second = first
        else:
            first, second = load_scales(pointers, columns, where, lengths, KIND)
        factor, factor_m = make_factors(first, second, KIND, FAMILY.VECTOR_EPS)
    x = make_features(g, p, m, v, factor, factor_m, FAMILY)
    return append_lines(x, first, pointers, where, lengths, KIND)


@jit
def _accumulate(
    row, local, g_ptr, decays, scale, live, partial,
    KIND: tl.constexpr, FAMILY: tl.constexpr, P_TYPE: tl.constexpr, ALIGN: tl.constexpr, WIDTH_ALIGN: tl.constexpr,
    SANITIZE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program's elements of one segment, and its row of sums."""
    pointers = find_pointers(row, P_TYPE, ALIGN)
    lengths = find_lengths(row, KIND, WIDTH_ALIGN)
    start, stop, lane = find_tile(row, local, KIND, WIDTH_ALIGN, BLOCK, STEPS)
    # squares of what is an element's own here are summed lane by lane: all inputs but the lines of WIDE segments
    COUNT: tl.constexpr = FAMILY.INPUTS if KIND == _STRIDED or KIND == _VECTOR else FAMILY.F
    columns, of_columns = (), ()
    if KIND == _WIDE:  # the same for all rows
        columns, of_columns = load_columns(pointers, lane, lengths)
    sums, row_sums = (), ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(_LINE_FEATURES):
        row_sums = row_sums + (tl.full((), 0.0, tl.float32),)
    for step in range(start, stop):
        where = find_elements(row, step, lane, live, KIND, WIDTH_ALIGN, BLOCK)
        at, mask = where[0], where[3]
        g = clip(load_gradient(g_ptr, at, mask, scale, SANITIZE), FAMILY.BOUND)
        p = tl.load(pointers[0] + at, mask, 0.0).to(tl.float32)
        x = _update_inputs(g, p, pointers, columns, where, lengths, decays, KIND, FAMILY)
        if KIND == _WIDE:
            row_sums = _add_squares(row_sums, load_row_features(pointers, where, lengths), None, _LINE_FEATURES)
        sums = _add_squares(sums, x, mask, COUNT)
    for k in tl.static_range(COUNT):
        tl.store(partial + k, tl.sum(sums[k]))
    if KIND == _WIDE:
        inside = lane < lengths[2]
        lanes, rows = tl.sum(inside.to(tl.float32)), (stop - start).to(tl.float32)
        for k in tl.static_range(_LINE_FEATURES):
            tl.store(partial + FAMILY.F + k, row_sums[k] * lanes)
            of_column = tl.where(inside, of_columns[k] * of_columns[k], 0.0)
            tl.store(partial + FAMILY.F + _LINE_FEATURES + k, tl.sum(of_column) * rows)


@jit
def _add_squares(sums, x, mask, COUNT: tl.constexpr):
    result = ()
    for k in tl.static_range(COUNT):
        square = x[k] * x[k]
        if mask is not None:
            square = tl.where(mask, square, 0.0)
        result = result + (sums[k] + square,)
    return result


@table_kernel
def _accumulate_kernel(
    table,  # int64 [n, COLUMNS]: see table.make_segments
    starts,  # int64 [n + 1]
    num_segments,  # n
    grads,  # [items], as the next two
    grad_scale_ptr,
    live_ptr,
    decays_ptr,  # [K, MOMENTA + 4]
    partial_ptr,  # [blocks, I]
    KINDS: tl.constexpr,  # a bit for each kind of segment that there is
    FAMILY: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    SANITIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    kind, index = tl.load(row + KIND_OF), load_index(row, COLUMNS)
    g_ptr = load_pointer(grads + index, 0, G_TYPE, G_ALIGN)
    scale, live = tl.load(grad_scale_ptr + index), tl.load(live_ptr + index)
    decays = decays_ptr + load_slot(row, COLUMNS) * (FAMILY.MOMENTA + 4)
    partial = partial_ptr + block.to(tl.int64) * FAMILY.INPUTS
    for k in tl.static_range(_NUM_KINDS):
        if KINDS & (1 << k):
            if kind == k:
                _accumulate(
                    row, local, g_ptr, decays, scale, live, partial, k, FAMILY, P_TYPE, ALIGN, WIDTH_ALIGN, SANITIZE,
                    BLOCK, STEPS,
                )  # fmt: skip


def launch_segments(
    segments: Segments,
    decays: Tensor,
    items: Items,
    family: Family,
    sanitize: bool = False,
    kinds: int = table.ALL_KINDS,
    tile: Tile = TILE,
) -> Tensor:
    """`reference` for all segments in one launch; accumulators in place.

    Args:
        segments: of `table.make_segments(tensors, index, tile.block)`, cut by
            `table.by_tiles(tile.block, tile.steps)`.
        decays: float32 `[K, momenta + 4]`, rows for the segments' slots.
        items: of what is not live nothing is written, and its sums mean nothing.
        sanitize: see `reference`.
        kinds: a bit for each kind among the segments (`1 << kind`); fewer compile faster.
        tile: how the work is divided; results differ by the order of sums.
    Returns:
        Sums of each block `[blocks, I]`, for `fold`, which adds them up in a fixed order.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    parameters.check_launch("accumulate", segments, {"decays": decays}, items)
    partial = decays.new_empty(segments.num_blocks, family.num_inputs)
    if segments.num_blocks == 0:
        return partial
    dtypes = segments.dtypes[0], items.dtype
    with torch.cuda.device_of(segments.table):
        _accumulate_kernel[(segments.num_blocks,)](
            *(segments.table, segments.starts, segments.num_segments, items.grads, items.rates.grad_scale),
            *(items.live, decays, partial),
            **_constexprs(family, tile, dtypes, find_aligns(segments, items), kinds, sanitize),
            num_warps=tile.warps,
            **OPTIONS,
        )
    return partial


def sign(family: Family, p_dtype: torch.dtype) -> str:
    """For which kernels the same tile is best: those of this family and parameters of this dtype.

    It is this pass's part of the key in `tuning.find` and `tuning.store`.
    """
    return tuning.sign(family, p_dtype)


def _constexprs(family: Family, tile: Tile, *others: Any) -> dict[str, Any]:
    """The kernel's compile-time constants; others: see `features.make_constants`."""
    return features.make_constants(family, *others) | {"BLOCK": tile.block, "STEPS": tile.steps}


def launch(
    group: Sequence[Tensors],
    decays: Tensor,
    rates: Rates,
    family: Family,
    sanitize: bool = False,
    tile: Tile = TILE,
) -> list[Accumulated]:
    """`reference` of every parameter of a group in Triton, on copies of accumulators; for tests and benchmarks.

    Args:
        decays: `[momenta + 4]`, of all.
        rates: `[1]` each, of all.
    """
    copies = [t._replace(m=t.m.clone(), v=None if t.v is None else t.v.clone(), slot=0) for t in group]
    for i, t in enumerate(copies):
        if t.first is not None and t.axes is None:
            first = t.first.clone()
            copies[i] = t._replace(first=first, second=first)
    parts = [part for i, t in enumerate(copies) for part in table.make_segments(t, i, tile.block)]
    segments = Segments(parts, table.by_tiles(tile.block, tile.steps))
    every = Rates(*(x.expand(len(group)).contiguous() for x in rates))
    items = parameters.make_items([t.g for t in group], every)
    partial = launch_segments(segments, decays[None], items, family, sanitize, tile=tile)
    counts = segments.starts.diff().tolist()
    squares = torch.stack([own.sum(0) for own in partial.split(counts)]).split([t.groups for t in group])
    return [
        Accumulated(t.m, t.v, t.first if t.axes is None else None, own) for t, own in zip(copies, squares, strict=True)
    ]


def sample(
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    family: Family | None = None,
) -> dict[str, object]:
    """Arguments of `launch`: a matrix and a vector in the middle of a run.

    Args:
        num_coordinates: of both together.
        generator: numbers are drawn on its device.
        dtype: of the accumulators, which is float32.
    """
    family = family or Family()
    group = samples.draw_group(samples.divide_coordinates(num_coordinates), family, generator, dtype, device)
    decays = samples.draw_decays(family, device)
    return {"group": group, "decays": decays, "rates": parameters.sample_rates(device), "family": family}


def bytes_moved(num_coordinates: int, family: Family | None = None, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: p, g, and momenta and second moment twice.

    Rows and columns, of which there are few, and the sums are left out.

    Args:
        param_bytes, grad_bytes: sizes of one number.
    """
    family = family or Family()
    return num_coordinates * (param_bytes + grad_bytes + 8 * (family.momenta + family.factored))


def compile_source(
    dtype: torch.dtype,
    family: Family | None = None,
    p_dtype: torch.dtype = torch.float32,
    kinds: int = table.ALL_KINDS,
    tile: Tile = TILE,
) -> CompileSource:
    """The kernel specialised to a family and to parameters and gradients of `p_dtype`, aligned as in a large model.

    Args:
        dtype: of the accumulators, which is float32.
        kinds: a bit for each kind of segment (`1 << kind`).
        tile: how the work is divided.
    """
    family = family or Family()
    constexprs = _constexprs(family, tile, (p_dtype, p_dtype), (ALIGNMENT,) * 3, kinds, False)
    return specialize(_accumulate_kernel, constexprs, {"num_warps": tile.warps, **OPTIONS}, **parameters.TYPES)


OP = make_op(__name__)
