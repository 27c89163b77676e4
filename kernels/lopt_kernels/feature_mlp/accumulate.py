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

from lopt_kernels.feature_mlp import features
from lopt_kernels.feature_mlp.features import (
    FIRST,
    FIRST_SCALE,
    LINE_FEATURES,
    SECOND,
    SECOND_SCALE,
    STRIDED,
    VECTOR,
    WIDE,
    Family,
    M,
    P,
    Tensors,
    V,
    average,
    clip,
    find_aligns,
    find_elements,
    find_lengths,
    find_tile,
    load_several,
    make_factors,
    make_features,
    make_line_features,
)
from lopt_kernels.launching import parameters, tuning
from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, load_gradient
from lopt_kernels.launching.segments import ALIGNMENT, Segments, find_row, load_index, load_pointer, load_slot
from lopt_kernels.launching.tuning import Tile

TILE = Tile(block=512, steps=16, warps=4)
STATE_DTYPES = (torch.float32,)
BLOCK = TILE.block
OPTIONS = {"enable_fp_fusion": True}


class Accumulated(NamedTuple):
    """New accumulators of one parameter, and sums of squares of its inputs `[groups, I]`; see `Family.num_inputs`."""

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


@jit
def _accumulate(
    row, local, g_ptr, decays, scale, live, partial,
    P_TYPE: tl.constexpr, ALIGN: tl.constexpr, SIZES: tl.constexpr, KIND: tl.constexpr,
    MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
    VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, INPUTS: tl.constexpr, SANITIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    p_ptr = load_pointer(row, P, P_TYPE, ALIGN)
    m_ptr, v_ptr = load_pointer(row, M, tl.float32, ALIGN), load_pointer(row, V, tl.float32, ALIGN)
    first_ptr, second_ptr = (
        load_pointer(row, FIRST, tl.float32, ALIGN),
        load_pointer(row, SECOND, tl.float32, ALIGN),
    )
    first_scale_ptr = load_pointer(row, FIRST_SCALE, tl.float32, ALIGN)
    second_scale_ptr = load_pointer(row, SECOND_SCALE, tl.float32, ALIGN)
    numel, first_length, second_length = find_lengths(row, SIZES, KIND, WIDTH)
    start, stop, lane = find_tile(row, local, SIZES, KIND, WIDTH, BLOCK, STEPS)
    # squares of what is an element's own here are summed lane by lane: all inputs but the lines of WIDE segments
    COUNT: tl.constexpr = INPUTS if KIND == STRIDED_ or KIND == VECTOR_ else F
    columns, of_columns = (), ()
    if KIND == WIDE_:  # the same for all rows
        columns = load_several(second_scale_ptr, lane, lane < second_length, second_length, 3)
        of_columns = make_line_features(load_several(second_ptr, lane, lane < second_length, second_length, 3))
    sums, row_sums = (), ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(LINE_FEATURES_):
        row_sums = row_sums + (tl.full((), 0.0, tl.float32),)
    for step in range(start, stop):
        at, first_at, second_at, mask = find_elements(row, step, lane, live, SIZES, KIND, WIDTH, BLOCK)
        g = clip(load_gradient(g_ptr, at, mask, scale, SANITIZE), BOUND)
        p = tl.load(p_ptr + at, mask, 0.0).to(tl.float32)
        m = ()
        for i in tl.static_range(MOMENTA):
            new = average(tl.load(m_ptr + i * numel + at, mask, 0.0), g, tl.load(decays + i))
            tl.store(m_ptr + i * numel + at, new, mask)
            m = m + (new,)
        v, factor, factor_m = g, m, m
        if FACTORED:
            v = average(tl.load(v_ptr + at, mask, 0.0), g * g, tl.load(decays + MOMENTA))
            tl.store(v_ptr + at, v, mask)
            first, second = (), columns
            if KIND == VECTOR_:
                for i in tl.static_range(3):
                    old = tl.load(first_ptr + i * numel + at, mask, 1.0)
                    new = average(old, g * g + SQUARE_EPS_, tl.load(decays + MOMENTA + 1 + i))
                    tl.store(first_ptr + i * numel + at, new, mask)
                    first = first + (new,)
                second = first
            elif KIND == WIDE_:
                first = load_several(first_scale_ptr, first_at, first_at < first_length, first_length, 3)
            else:
                first = load_several(first_scale_ptr, first_at, mask, first_length, 3)
                second = load_several(second_scale_ptr, second_at, mask, second_length, 3)
            factor, factor_m = make_factors(first, second, KIND, VECTOR_EPS)
        x = make_features(g, p, m, v, factor, factor_m, MOMENTA, FACTORED, CLIPS, RS_EPS)
        if KIND == VECTOR_:
            own = make_line_features(first)
            x = x + own + own
        elif KIND == STRIDED_:
            x = x + make_line_features(load_several(first_ptr, first_at, mask, first_length, 3))
            x = x + make_line_features(load_several(second_ptr, second_at, mask, second_length, 3))
        elif KIND == WIDE_:
            line = load_several(first_ptr, first_at, first_at < first_length, first_length, 3)
            row_sums = _add_squares(row_sums, make_line_features(line), LINE_FEATURES_)
        new_sums = ()
        for k in tl.static_range(COUNT):
            new_sums = new_sums + (sums[k] + tl.where(mask, x[k] * x[k], 0.0),)
        sums = new_sums
    for k in tl.static_range(COUNT):
        tl.store(partial + k, tl.sum(sums[k]))
    if KIND == WIDE_:
        inside = lane < second_length
        lanes, rows = tl.sum(inside.to(tl.float32)), (stop - start).to(tl.float32)
        for k in tl.static_range(LINE_FEATURES_):
            tl.store(partial + F + k, row_sums[k] * lanes)
            of_column = tl.where(inside, of_columns[k] * of_columns[k], 0.0)
            tl.store(partial + F + LINE_FEATURES_ + k, tl.sum(of_column) * rows)


@jit
def _add_squares(sums, x, COUNT: tl.constexpr):
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (sums[k] + x[k] * x[k],)
    return result


WIDE_, STRIDED_, VECTOR_ = (constant(x) for x in (WIDE, STRIDED, VECTOR))
NUM_KINDS_ = constant(features.NUM_KINDS)
SQUARE_EPS_ = constant(features.SQUARE_EPS)
LINE_FEATURES_ = constant(LINE_FEATURES)


@table_kernel
def _accumulate_kernel(
    table,  # int64 [n, COLUMNS]: see features.make_segments
    starts,  # int64 [n + 1]
    num_segments,  # n
    grads,  # [items], as the next two
    grad_scale_ptr,
    live_ptr,
    decays_ptr,  # [K, MOMENTA + 4]
    partial_ptr,  # [blocks, I]
    KINDS: tl.constexpr,  # a bit for each kind of segment that there is
    COLUMNS: tl.constexpr,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, SIZES: tl.constexpr,
    MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
    VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, INPUTS: tl.constexpr, SANITIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    kind, index = tl.load(row + SIZES + 1), load_index(row, COLUMNS)
    g_ptr = load_pointer(grads + index, 0, G_TYPE, G_ALIGN)
    scale, live = tl.load(grad_scale_ptr + index), tl.load(live_ptr + index)
    decays = decays_ptr + load_slot(row, COLUMNS) * (MOMENTA + 4)
    partial = partial_ptr + block.to(tl.int64) * INPUTS
    for k in tl.static_range(NUM_KINDS_):
        if KINDS & (1 << k):
            if kind == k:
                _accumulate(
                    row, local, g_ptr, decays, scale, live, partial, P_TYPE, ALIGN, SIZES, k, MOMENTA, FACTORED,
                    CLIPS, RS_EPS, VECTOR_EPS, BOUND, F, INPUTS, SANITIZE, WIDTH, BLOCK, STEPS,
                )  # fmt: skip


def launch_segments(
    segments: Segments,
    decays: Tensor,
    items: Items,
    family: Family,
    sanitize: bool = False,
    kinds: int = features.ALL_KINDS,
    tile: Tile = TILE,
) -> Tensor:
    """`reference` for all segments in one launch; accumulators in place.

    Args:
        segments: of `features.make_segments(tensors, index, tile.block)`, cut by
            `features.by_tiles(tile.block, tile.steps)`.
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
            **_constexprs(family, dtypes, find_aligns(segments, items), kinds, sanitize, tile),
            num_warps=tile.warps,
            **OPTIONS,
        )
    return partial


def sign(family: Family, p_dtype: torch.dtype) -> str:
    """For which kernels the same tile is best, for `tuning.find`: those of this family and parameters of this dtype."""
    return tuning.sign(family, p_dtype)


def _constexprs(
    family: Family,
    dtypes: Sequence[torch.dtype],
    aligns: Sequence[int],
    kinds: int,
    sanitize: bool,
    tile: Tile,
) -> dict[str, Any]:
    """The kernel's compile-time constants; dtypes are of parameters and gradients, see `features.find_aligns`."""
    types: dict[str, Any] = {"P_TYPE": TRITON_TYPES[dtypes[0]], "G_TYPE": TRITON_TYPES[dtypes[1]]}
    types |= dict(zip(("ALIGN", "G_ALIGN", "WIDTH"), aligns, strict=True))
    columns = features.NUM_COLUMNS
    table = {"KINDS": kinds & family.kinds, "COLUMNS": columns + features.NUM_SIZES + 2, "SIZES": columns}
    sizes = {"F": family.num_features, "INPUTS": family.num_inputs, "BLOCK": tile.block, "STEPS": tile.steps}
    return {**types, **table, **features.name_constants(family), **sizes, "SANITIZE": sanitize}


def launch(
    group: Sequence[Tensors],
    decays: Tensor,
    rates: Rates,
    family: Family,
    sanitize: bool = False,
    tile: Tile = TILE,
) -> list[Accumulated]:
    """`reference` of every parameter of a group, whose accumulators stay as they are.

    Args:
        decays: `[momenta + 4]`, of all.
        rates: `[1]` each, of all.
    """
    copies = [t._replace(m=t.m.clone(), v=None if t.v is None else t.v.clone(), slot=0) for t in group]
    for i, t in enumerate(copies):
        if t.first is not None and t.axes is None:
            first = t.first.clone()
            copies[i] = t._replace(first=first, second=first)
    parts = [part for i, t in enumerate(copies) for part in features.make_segments(t, i, tile.block)]
    segments = Segments(parts, features.by_tiles(tile.block, tile.steps))
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
    group = features.draw_group(features.divide_coordinates(num_coordinates), family, generator, dtype, device)
    decays = features.draw_decays(family, device)
    return {"group": group, "decays": decays, "rates": parameters.sample_rates(device), "family": family}


def bytes_moved(num_coordinates: int, family: Family | None = None, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: p, g, and momenta and second moment twice."""
    family = family or Family()
    return num_coordinates * (param_bytes + grad_bytes + 8 * (family.momenta + family.factored))


def compile_source(
    dtype: torch.dtype,
    family: Family | None = None,
    p_dtype: torch.dtype = torch.float32,
    kinds: int = features.ALL_KINDS,
    tile: Tile = TILE,
) -> CompileSource:
    """The kernel specialised to a family and to parameters and gradients of `p_dtype`."""
    family = family or Family()
    constexprs = _constexprs(family, (p_dtype, p_dtype), (ALIGNMENT,) * 3, kinds, sanitize=False, tile=tile)
    return specialize(_accumulate_kernel, constexprs, {"num_warps": tile.warps, **OPTIONS}, **parameters.TYPES)


OP = make_op(__name__)
