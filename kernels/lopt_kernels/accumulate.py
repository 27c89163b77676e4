"""Momenta, second moments and vectors' averages in place, and the sums of squares of the features they make.

Source: Metz et al. 2022, arXiv 2203.11860. Sums meet in a buffer of one row per program and are added up in a second
launch, in a fixed order: two runs are equal bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005, SIM102 (Triton concatenates tuples, and tests constants apart from values)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels import apply, features
from lopt_kernels.apply import Terms
from lopt_kernels.features import Family, Tensors
from lopt_kernels.op import CompileSource, Op, specialize
from lopt_kernels.segments import ALIGNMENT, Segments

try:
    import triton
    import triton.language as tl

    from lopt_kernels.apply import load_gradient
    from lopt_kernels.features import (
        FIRST,
        FIRST_SCALE,
        SECOND_SCALE,
        STRIDED,
        VECTOR,
        WIDE,
        G,
        M,
        P,
        V,
        average,
        clip,
        find_elements,
        find_lengths,
        find_tile,
        load_several,
        make_factors,
        make_features,
        make_line_features,
    )  # fmt: skip
    from lopt_kernels.segments import TRITON_TYPES, find_row, load_pointer
except ImportError:  # the reference needs torch only
    triton = None

TILE = BLOCK, STEPS = 512, 16  # elements that a program takes at once, and how often at most
SUM_ROWS = 64  # rows of the buffer that the second launch takes at once
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUM_OPTIONS = {"num_warps": 4}


class Accumulated(NamedTuple):
    """New accumulators of one parameter, and sums of squares `[groups, S]`, see `Family.num_sums`."""

    m: Tensor
    v: Tensor | None
    averages: Tensor | None
    squares: Tensor


def reference(t: Tensors, decays: Tensor, terms: Terms, family: Family, sanitize: bool = False) -> Accumulated:
    """One parameter's part of the launch; pure.

    Args:
        decays: of momenta, second moment and factored moments, `[momenta + 4]`.
        terms: `[1]` each; the gradient's factor is used.
        sanitize: entries of g that are not finite count as 0.
    """
    momentum, second, factored = decays.split([family.momenta, 1, features.LINES])
    g = features.clip_gradient(apply.read_gradient(t.g, terms, sanitize), family)
    m = torch.lerp(g, t.m, momentum.reshape(-1, *[1] * g.ndim))
    v = None if t.v is None else torch.lerp(g.square(), t.v, second)
    averages = None
    if t.first is not None and t.axes is None:
        square = g.square() + features.SQUARE_EPS
        averages = torch.lerp(square, t.first, factored.reshape(-1, *[1] * g.ndim))
        t = t._replace(first=averages, second=averages)
    x = features.element_features(g, t._replace(m=m, v=v), family)
    if averages is not None:
        x = torch.cat([x, features.line_features(averages)])
    squares = x.square().reshape(len(x), -1, t.groups).sum(1).T
    missing = family.num_sums - squares.shape[1]  # those that a vector has of its own
    return Accumulated(m, v, averages, torch.nn.functional.pad(squares, (0, missing)))


if triton is not None:

    @triton.jit
    def _accumulate(
        row, local, decays, scale, live, partial,
        P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGN: tl.constexpr, SIZES: tl.constexpr, KIND: tl.constexpr,
        MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
        VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, S: tl.constexpr, SANITIZE: tl.constexpr,
        BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        p_ptr, g_ptr = load_pointer(row, P, P_TYPE, ALIGN), load_pointer(row, G, G_TYPE, ALIGN)
        m_ptr, v_ptr = load_pointer(row, M, tl.float32, ALIGN), load_pointer(row, V, tl.float32, ALIGN)
        averages_ptr = load_pointer(row, FIRST, tl.float32, ALIGN)
        first_ptr = load_pointer(row, FIRST_SCALE, tl.float32, ALIGN)
        second_ptr = load_pointer(row, SECOND_SCALE, tl.float32, ALIGN)
        numel, first_length, second_length = find_lengths(row, SIZES)
        start, stop, lane = find_tile(row, local, SIZES, KIND, BLOCK, STEPS)
        columns = ()
        if KIND == WIDE_:  # the same for all rows
            columns = load_several(second_ptr, lane, lane < second_length, second_length, 3)
        sums = ()
        for _ in tl.static_range(S):
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
        for step in range(start, stop):
            at, first_at, second_at, mask = find_elements(row, step, lane, live, SIZES, KIND, BLOCK)
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
                first = ()
                for i in tl.static_range(3):
                    if KIND == VECTOR_:
                        old = tl.load(averages_ptr + i * numel + at, mask, 1.0)
                        new = average(old, g * g + SQUARE_EPS_, tl.load(decays + MOMENTA + 1 + i))
                        tl.store(averages_ptr + i * numel + at, new, mask)
                        first = first + (new,)
                    elif KIND == WIDE_:
                        at_row = tl.load(first_ptr + i * first_length + first_at, first_at < first_length, 0.0)
                        first = first + (at_row,)
                    else:
                        first = first + (tl.load(first_ptr + i * first_length + first_at, mask, 0.0),)
                second = columns
                if KIND == STRIDED_:
                    second = load_several(second_ptr, second_at, mask, second_length, 3)
                elif KIND != WIDE_:
                    second = first
                factor, factor_m = make_factors(first, second, KIND, VECTOR_EPS)
            x = make_features(g, p, m, v, factor, factor_m, MOMENTA, FACTORED, CLIPS, RS_EPS)
            if KIND == VECTOR_:
                x = x + make_line_features(first)
            new_sums = ()
            for k in tl.static_range(S):
                if k < F or KIND == VECTOR_:
                    new_sums = new_sums + (sums[k] + tl.where(mask, x[k] * x[k], 0.0),)
                else:
                    new_sums = new_sums + (sums[k],)
            sums = new_sums
        for k in tl.static_range(S):
            tl.store(partial + k, tl.sum(sums[k]))

    WIDE_, STRIDED_, VECTOR_ = (tl.constexpr(x) for x in (WIDE, STRIDED, VECTOR))
    NUM_KINDS_ = tl.constexpr(features.NUM_KINDS)
    SQUARE_EPS_ = tl.constexpr(features.SQUARE_EPS)

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _accumulate_kernel(
        table,  # int64 [n, COLUMNS]: see features.make_segments
        starts,  # int64 [n + 1]
        num_segments,  # n
        grad_scale_ptr,  # [n]
        live_ptr,  # [n]
        decays_ptr,  # [K, MOMENTA + 4]
        partial_ptr,  # [blocks, S]
        KINDS: tl.constexpr,  # a bit for each kind of segment that there is
        COLUMNS: tl.constexpr,
        P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGN: tl.constexpr, SIZES: tl.constexpr,
        MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
        VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, S: tl.constexpr, SANITIZE: tl.constexpr,
        BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        segment, row, local = find_row(table, starts, num_segments, block, COLUMNS)
        kind = tl.load(row + SIZES + 1)
        scale, live = tl.load(grad_scale_ptr + segment), tl.load(live_ptr + segment)
        decays = decays_ptr + tl.load(row + COLUMNS - 1) * (MOMENTA + 4)
        partial = partial_ptr + block.to(tl.int64) * S
        for k in tl.static_range(NUM_KINDS_):
            if KINDS & (1 << k):
                if kind == k:
                    _accumulate(
                        row, local, decays, scale, live, partial, P_TYPE, G_TYPE, ALIGN, SIZES, k, MOMENTA, FACTORED,
                        CLIPS, RS_EPS, VECTOR_EPS, BOUND, F, S, SANITIZE, BLOCK, STEPS,
                    )  # fmt: skip

    @triton.jit
    def _sum_kernel(
        partial_ptr,  # [blocks, S]
        starts,  # [n + 1]
        sums_ptr,  # [n, S]
        S: tl.constexpr,
        PADDED: tl.constexpr,  # S to a power of two
        ROWS: tl.constexpr,
    ):
        segment = tl.program_id(0).to(tl.int64)
        first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
        column = tl.arange(0, PADDED)
        total = tl.zeros([ROWS, PADDED], tl.float32)
        for start in range(first, last, ROWS):
            block = start + tl.arange(0, ROWS).to(tl.int64)
            mask = (block < last)[:, None] & (column < S)
            total += tl.load(partial_ptr + (block * S)[:, None] + column, mask, 0.0)
        tl.store(sums_ptr + segment * S + column, tl.sum(total, axis=0), column < S)


def launch_segments(
    segments: Segments,
    decays: Tensor,
    terms: Terms,
    live: Tensor,
    family: Family,
    sanitize: bool = False,
    kinds: int = features.ALL_KINDS,
    tile: tuple[int, int] = TILE,
) -> Tensor:
    """`reference` for all segments in two launches; accumulators in place.

    Args:
        segments: of `features.make_segments(tensors, tile[0])`, cut by `features.by_tiles(*tile)`.
        decays: float32 `[K, momenta + 4]`, rows for the segments' indices.
        terms: float32 `[n]` each.
        live: bool `[n]`; a segment that is not live is not written, its sums are 0.
        sanitize: see `reference`.
        kinds: a bit for each kind among the segments (`1 << kind`); fewer compile faster.
        tile: elements that a program takes at once, and how often at most.
    Returns:
        Sums `[n, S]`.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    apply.check_launch("accumulate", segments, _Decays(decays), terms, live)
    sums = decays.new_zeros(segments.num_segments, family.num_sums)
    if segments.num_blocks == 0:
        return sums
    partial = torch.empty(segments.num_blocks, family.num_sums, device=sums.device)
    with torch.cuda.device_of(segments.table):
        _accumulate_kernel[(segments.num_blocks,)](
            *(segments.table, segments.starts, segments.num_segments, terms.grad_scale, live, decays, partial),
            **_constexprs(family, segments.dtypes, segments.align, kinds, sanitize, tile),
            **OPTIONS,
        )
        padded = triton.next_power_of_2(family.num_sums)
        _sum_kernel[(segments.num_segments,)](
            partial, segments.starts, sums, family.num_sums, padded, SUM_ROWS, **SUM_OPTIONS
        )
    return sums


class _Decays(NamedTuple):
    decays: Tensor


def _constexprs(
    family: Family, dtypes: Sequence[torch.dtype], align: int, kinds: int, sanitize: bool, tile: tuple[int, int]
) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    types = {"P_TYPE": TRITON_TYPES[dtypes[0]], "G_TYPE": TRITON_TYPES[dtypes[1]]}
    kinds &= family.kinds
    table = {"KINDS": kinds, "COLUMNS": len(dtypes) + features.NUM_SIZES + 1, "ALIGN": align, "SIZES": len(dtypes)}
    sizes = {"F": family.num_features, "S": family.num_sums, "BLOCK": tile[0], "STEPS": tile[1]}
    return {**types, **table, **features.name_constants(family), **sizes, "SANITIZE": sanitize}


def launch(
    group: Sequence[Tensors],
    decays: Tensor,
    terms: Terms,
    family: Family,
    sanitize: bool = False,
    tile: tuple[int, int] = TILE,
) -> list[Accumulated]:
    """`reference` of every parameter of a group, whose accumulators stay as they are.

    Args:
        decays: `[momenta + 4]`, of all.
        terms: `[1]` each, of all.
    """
    copies = [t._replace(m=t.m.clone(), v=None if t.v is None else t.v.clone()) for t in group]
    for i, t in enumerate(copies):
        if t.first is not None and t.axes is None:
            first = t.first.clone()
            copies[i] = t._replace(first=first, second=first)
    parts = [features.make_segments(t._replace(index=0), tile[0]) for t in copies]
    segments = Segments([part for own in parts for part in own], features.by_tiles(*tile))
    every = Terms(*(x.expand(segments.num_segments).contiguous() for x in terms))
    live = torch.ones(segments.num_segments, dtype=torch.bool, device=decays.device)
    sums = launch_segments(segments, decays[None], every, live, family, sanitize, tile=tile)
    rows = sums.split([len(own) for own in parts])
    return [
        Accumulated(t.m, t.v, t.first if t.axes is None else None, own) for t, own in zip(copies, rows, strict=True)
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
    decays = torch.tensor([0.9, 0.99, 0.999, 0.5, 0.95, 0.1][: family.momenta] + [0.999, 0.9, 0.99, 0.999])
    return {"group": group, "decays": decays.to(device), "terms": apply.sample_terms(device), "family": family}


def bytes_moved(num_coordinates: int, family: Family | None = None, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: p, g, and momenta and second moment twice."""
    family = family or Family()
    return num_coordinates * (param_bytes + grad_bytes + 8 * (family.momenta + family.factored))


def compile_source(
    dtype: torch.dtype,
    family: Family | None = None,
    p_dtype: torch.dtype = torch.float32,
    kinds: int = features.ALL_KINDS,
) -> CompileSource:
    """The kernel specialised to a family and to parameters and gradients of `p_dtype`."""
    family = family or Family()
    dtypes = (p_dtype, p_dtype, *[dtype] * (features.NUM_COLUMNS - 2))
    constexprs = _constexprs(family, dtypes, ALIGNMENT, kinds, sanitize=False, tile=TILE)
    types = {"table": "*i64", "starts": "*i64", "num_segments": "i32"}
    return specialize(_accumulate_kernel, constexprs, OPTIONS, **types, live_ptr="*i1")


OP = Op(
    name="accumulate",
    reference=reference,
    launch=launch,
    launch_segments=launch_segments,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=(torch.float32,),
    block=BLOCK,
)
