"""What a step knows of its parameters before it begins: which gradients are finite, how many updates they have had.

Nothing of it comes to the host: a parameter with a gradient that is not finite is masked, counted, and its counter
stays. Gradients with entries beyond `parameters.BOUND`, which count as that, are counted, too. Rounding at random gets
its seeds here, from (seed, step), as in `lopt.core.random`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import TRITON_TYPES, constant, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize
from lopt_kernels.launching.parameters import BOUND, TYPES
from lopt_kernels.launching.random import fold, fold_seed
from lopt_kernels.launching.segments import (
    ALIGNMENT,
    Segment,
    Segments,
    by_elements,
    find_alignment,
    find_row,
    load_index,
    load_pointer,
    load_size,
    upload,
)

BLOCK = 4096  # elements per program
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
COLUMNS = 5  # counter, seed | elements | index, slot
FLAGS = 1024  # blocks' flags at once
LARGE, BAD = 1, 2  # a block's flags, which add up: beyond the bound, not finite


class Clock(NamedTuple):
    """Of n parameters.

    Attributes:
        live: bool `[n]`: the gradient is finite.
        steps: updates before this one, int64 `[n]`.
        seeds: of this step's rounding at random, int64 `[n]`.
        counters: updates with this one, int64 `[n]`.
        tally: how many are not live, and how many of the live have gradients beyond the bound, int64 `[2]`.
    """

    live: Tensor
    steps: Tensor
    seeds: Tensor
    counters: Tensor
    tally: Tensor


def reference(
    grads: Sequence[Tensor],
    counters: Tensor,
    seeds: Tensor,
    scales: Tensor,
    found_inf: Tensor | None = None,
    sanitize: bool = False,
) -> Clock:
    """Which parameters are live, and their counters and seeds: the definition of both kernels in plain PyTorch; pure.

    Args:
        grads: of any floating dtype.
        counters: updates made so far, int64 `[n]`.
        seeds: of the parameters, int64 `[n]`.
        scales: `Rates.grad_scale`, float32 `[n]`.
        found_inf: float32 `[1]` of a gradient scaler, not 0: no gradient is live; 0: all are.
        sanitize: all are live, as entries that are not finite count as 0.
    """
    finite = torch.stack([g.isfinite().all() for g in grads])
    large = torch.stack([
        ((g.float() * scale).abs() > BOUND).logical_and(g.isfinite()).any()
        for g, scale in zip(grads, scales, strict=True)
    ])  # fmt: skip
    live = finite | sanitize if found_inf is None else (found_inf == 0).expand(len(grads))
    tally = torch.stack([(~live).sum(), (live & large).sum()])
    return Clock(live, counters.clone(), fold(seeds, counters), counters + live, tally)


_BOUND, _LARGE, _BAD = constant(BOUND), constant(LARGE), constant(BAD)


@table_kernel
def _look_kernel(
    table,  # int64 [n, COLUMNS]
    starts,  # int64 [n + 1]
    num_segments,  # n
    grads,  # [items]
    grad_scale_ptr,  # [items]
    flags_ptr,  # int8 [blocks]
    G_TYPE: tl.constexpr,
    G_ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    index = load_index(row, COLUMNS)
    g = load_pointer(grads + index, 0, G_TYPE, G_ALIGN)
    at = local * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(g + at, at < load_size(row, 2, 1), 0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")  # NaN compares false
    large = tl.where(finite & (tl.abs(x * tl.load(grad_scale_ptr + index)) > _BOUND), _LARGE, 0)
    bad = tl.where(finite, 0, _BAD)
    tl.store(flags_ptr + block, (tl.max(large, axis=0) + tl.max(bad, axis=0)).to(tl.int8))


@table_kernel
def _clock_kernel(
    table,
    starts,
    flags_ptr,  # int8 [blocks]
    found_inf_ptr,  # [1] or None
    live_ptr,  # [items], as the next two
    steps_ptr,
    seeds,  # or None
    tally_ptr,  # int64 [2] or more
    COLUMNS: tl.constexpr,
    FLAGS: tl.constexpr,
    SANITIZE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = table + segment * COLUMNS
    index = load_index(row, COLUMNS)
    start, stop = tl.load(starts + segment), tl.load(starts + segment + 1)
    large, bad = tl.zeros([FLAGS], tl.int32), tl.zeros([FLAGS], tl.int32)
    for first in range(start, stop, FLAGS):
        at = first + tl.arange(0, FLAGS)
        flags = tl.load(flags_ptr + at, at < stop, 0).to(tl.int32)
        large, bad = tl.maximum(large, flags & _LARGE), tl.maximum(bad, flags & _BAD)
    live = index >= 0
    if found_inf_ptr is not None:
        live = tl.load(found_inf_ptr) == 0
    elif not SANITIZE:
        live = tl.max(bad, axis=0) == 0
    counter = load_pointer(row, 0, tl.int64, 1)
    step = tl.load(counter)
    tl.store(live_ptr + index, live)
    tl.store(steps_ptr + index, step)
    if seeds is not None:
        seed = tl.load(load_pointer(row, 1, tl.int64, 1))
        tl.store(seeds + index, fold_seed(seed, step))
    tl.store(counter, step + live.to(tl.int64))
    if live == 0:
        tl.atomic_add(tally_ptr, 1)
    elif tl.max(large, axis=0) > 0:
        tl.atomic_add(tally_ptr + 1, 1)


def launch_segments(
    segments: Segments,
    grads: Tensor,
    g_dtype: torch.dtype,
    live: Tensor,
    steps: Tensor,
    seeds: Tensor | None,
    tally: Tensor,
    scales: Tensor,
    found_inf: Tensor | None = None,
    sanitize: bool = False,
    align: int = 1,
) -> None:
    """`reference` for all segments in two launches.

    Args:
        segments: of (counter, seed), int64 `[]` each, and sizes (elements,), cut by `by_elements(BLOCK)`; one each.
        grads: addresses of gradients of `g_dtype`, int64 `[items]`; multiples of `align`.
        live: bool `[items]`, written.
        steps: int64 `[items]`, written.
        seeds: int64 `[items]`, written, or None.
        tally: int64; its first number grows by the parameters that are not live, its second by those of the others
            that have gradients beyond the bound.
        scales, found_inf, sanitize: see `reference`.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    check_triton("clock", segments.table.device)
    with torch.cuda.device_of(segments.table):
        flags = torch.empty(segments.num_blocks, dtype=torch.int8, device=segments.table.device)
        if segments.num_blocks:
            _look_kernel[(segments.num_blocks,)](
                *(segments.table, segments.starts, segments.num_segments, grads, scales, flags),
                **_constexprs(g_dtype, align),
                **OPTIONS,
            )
        table = (segments.table, segments.starts, flags, found_inf)
        _clock_kernel[(segments.num_segments,)](*table, live, steps, seeds, tally, COLUMNS, FLAGS, sanitize, **OPTIONS)


def _constexprs(g_dtype: torch.dtype, align: int) -> dict[str, object]:
    return {"G_TYPE": TRITON_TYPES[g_dtype], "G_ALIGN": align, "COLUMNS": COLUMNS, "BLOCK": BLOCK}


def launch(
    grads: Sequence[Tensor],
    counters: Tensor,
    seeds: Tensor,
    scales: Tensor,
    found_inf: Tensor | None = None,
    sanitize: bool = False,
) -> Clock:
    """`reference` in Triton for a list of gradients, as tests and benchmarks call it; arguments stay as they are.

    Args:
        grads: at least one, contiguous and of one dtype.
        counters, seeds, scales, found_inf, sanitize: as in `reference`.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    counted, device = counters.clone(), counters.device
    pairs = zip(counted.unbind(), seeds.unbind(), strict=True)
    made = [Segment(pair, (g.numel(),), i) for i, (pair, g) in enumerate(zip(pairs, grads, strict=True))]
    addresses = [g.data_ptr() for g in grads]
    live, steps, new = torch.empty_like(counters, dtype=torch.bool), torch.empty_like(counters), torch.empty_like(seeds)
    tally = torch.zeros(2, dtype=torch.int64, device=device)
    on_device, align = upload(addresses, torch.int64, device), find_alignment(addresses)
    segments = Segments(made, by_elements(BLOCK))
    told = (scales, found_inf, sanitize, align)
    launch_segments(segments, on_device, grads[0].dtype, live, steps, new, tally, *told)
    return Clock(live, steps, new, counted, tally)


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: three gradients, which have so many elements together.

    The second ends with NaN if it has any, and the third, in the dtypes that can hold it, with a very large number.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the gradients.
    """
    sizes = [num_coordinates // 2, num_coordinates // 4, num_coordinates - num_coordinates // 2 - num_coordinates // 4]
    grads = [
        torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32).to(device, dtype)
        for size in sizes
    ]
    grads[1][-1:] = torch.nan
    grads[2][-1:] = min(4 * BOUND, torch.finfo(dtype).max)
    count = torch.arange(3, device=device)
    scales = torch.tensor([1.0, -1.0, -0.5], dtype=torch.float32, device=device)
    return {"grads": grads, "counters": 7 * count, "seeds": fold(count, count), "scales": scales}


def bytes_moved(num_coordinates: int, grad_bytes: int = 4) -> int:
    """Bytes one launch has to read: all gradients, once.

    Counters, flags and seeds are a few numbers per tensor and are left out.

    Args:
        grad_bytes: the size of one number.
    """
    return num_coordinates * grad_bytes


def compile_source(dtype: torch.dtype) -> CompileSource:
    """The kernel that looks at gradients of `dtype`, aligned as in a large model.

    It can be compiled and inspected where no GPU is. The second kernel, of one program per parameter, is left out.
    """
    return specialize(_look_kernel, _constexprs(dtype, ALIGNMENT), OPTIONS, **TYPES, flags_ptr="*i8")


OP = make_op(__name__)
