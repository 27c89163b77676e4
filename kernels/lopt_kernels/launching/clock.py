"""What a step knows of its parameters before it begins: which gradients are finite, how many updates they have had.

Nothing of it comes to the host: a parameter with a gradient that is not finite is masked, counted, and its counter
stays. Rounding at random gets its seeds here, from (seed, step), as in `lopt.core.random`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import TRITON_TYPES, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize
from lopt_kernels.launching.parameters import TYPES
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


class Clock(NamedTuple):
    """Of n parameters.

    Attributes:
        live: bool `[n]`: the gradient is finite.
        steps: updates before this one, int64 `[n]`.
        seeds: of this step's rounding at random, int64 `[n]`.
        counters: updates with this one, int64 `[n]`.
        skipped: how many are not live, int64 `[1]`.
    """

    live: Tensor
    steps: Tensor
    seeds: Tensor
    counters: Tensor
    skipped: Tensor


def reference(grads: Sequence[Tensor], counters: Tensor, seeds: Tensor, found_inf: Tensor | None = None) -> Clock:
    """Which parameters are live, and their counters and seeds: the definition of both kernels in plain PyTorch; pure.

    Args:
        grads: of any floating dtype.
        counters: updates made so far, int64 `[n]`.
        seeds: of the parameters, int64 `[n]`.
        found_inf: float32 `[1]` of a gradient scaler, not 0: no gradient is finite; these are not looked at then.
    """
    if found_inf is not None:
        live = (found_inf == 0).expand(len(grads))
    else:
        live = torch.stack([g.isfinite().all() for g in grads])
    return Clock(live, counters.clone(), fold(seeds, counters), counters + live, (~live).sum().reshape(1))


@table_kernel
def _finite_kernel(
    table,  # int64 [n, COLUMNS]
    starts,  # int64 [n + 1]
    num_segments,  # n
    grads,  # [items]
    flags_ptr,  # int8 [blocks]
    G_TYPE: tl.constexpr,
    G_ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    _, row, local = find_row(table, starts, num_segments, block, COLUMNS)
    g = load_pointer(grads + load_index(row, COLUMNS), 0, G_TYPE, G_ALIGN)
    at = local * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(g + at, at < load_size(row, 2, 1), 0.0).to(tl.float32)
    bad = tl.where(tl.abs(x) < float("inf"), 0, 1)  # NaN compares false
    tl.store(flags_ptr + block, tl.max(bad, axis=0).to(tl.int8))


@table_kernel
def _clock_kernel(
    table,
    starts,
    flags_ptr,  # int8 [blocks], or None: all are finite
    found_inf_ptr,  # [1] or None
    live_ptr,  # [items], as the next two
    steps_ptr,
    seeds,  # or None
    skipped_ptr,  # int64 [1] or more
    COLUMNS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = table + segment * COLUMNS
    index = load_index(row, COLUMNS)
    live = index >= 0
    if found_inf_ptr is not None:
        live = tl.load(found_inf_ptr) == 0
    elif flags_ptr is not None:
        start, stop = tl.load(starts + segment), tl.load(starts + segment + 1)
        bad = tl.zeros([FLAGS], tl.int32)
        for first in range(start, stop, FLAGS):
            at = first + tl.arange(0, FLAGS)
            bad = tl.maximum(bad, tl.load(flags_ptr + at, at < stop, 0).to(tl.int32))
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
        tl.atomic_add(skipped_ptr, 1)


def launch_segments(
    segments: Segments,
    grads: Tensor,
    g_dtype: torch.dtype,
    live: Tensor,
    steps: Tensor,
    seeds: Tensor | None,
    skipped: Tensor,
    found_inf: Tensor | None = None,
    look: bool = True,
    align: int = 1,
) -> None:
    """`reference` for all segments in two launches, one where gradients need not be looked at.

    Args:
        segments: of (counter, seed), int64 `[]` each, and sizes (elements,), cut by `by_elements(BLOCK)`; one each.
        grads: addresses of gradients of `g_dtype`, int64 `[items]`; multiples of `align`.
        live: bool `[items]`, written.
        steps: int64 `[items]`, written.
        seeds: int64 `[items]`, written, or None.
        skipped: int64, its first number grows by the parameters that are not live.
        found_inf: float32 `[1]` of a gradient scaler, which has looked at the gradients.
        look: False: all gradients count as finite.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    check_triton("clock", segments.table.device)
    flags = None
    with torch.cuda.device_of(segments.table):
        if look and found_inf is None:
            flags = torch.empty(segments.num_blocks, dtype=torch.int8, device=segments.table.device)
            if segments.num_blocks:
                _finite_kernel[(segments.num_blocks,)](
                    *(segments.table, segments.starts, segments.num_segments, grads, flags),
                    **_constexprs(g_dtype, align),
                    **OPTIONS,
                )
        table = (segments.table, segments.starts, flags, found_inf)
        _clock_kernel[(segments.num_segments,)](*table, live, steps, seeds, skipped, COLUMNS, FLAGS, **OPTIONS)


def _constexprs(g_dtype: torch.dtype, align: int) -> dict[str, object]:
    return {"G_TYPE": TRITON_TYPES[g_dtype], "G_ALIGN": align, "COLUMNS": COLUMNS, "BLOCK": BLOCK}


def launch(grads: Sequence[Tensor], counters: Tensor, seeds: Tensor, found_inf: Tensor | None = None) -> Clock:
    """`reference` in Triton for a list of gradients, as tests and benchmarks call it; arguments stay as they are.

    Args:
        grads: at least one, contiguous and of one dtype.
        counters, seeds: int64 `[n]`, as in `reference`.
        found_inf: float32 `[1]` of a gradient scaler, or None: the gradients are looked at.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    counted, device = counters.clone(), counters.device
    pairs = zip(counted.unbind(), seeds.unbind(), strict=True)
    made = [Segment(pair, (g.numel(),), i) for i, (pair, g) in enumerate(zip(pairs, grads, strict=True))]
    addresses = [g.data_ptr() for g in grads]
    live, steps, new = torch.empty_like(counters, dtype=torch.bool), torch.empty_like(counters), torch.empty_like(seeds)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)
    on_device, align = upload(addresses, torch.int64, device), find_alignment(addresses)
    segments = Segments(made, by_elements(BLOCK))
    launch_segments(segments, on_device, grads[0].dtype, live, steps, new, skipped, found_inf, align=align)
    return Clock(live, steps, new, counted, skipped)


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: three gradients, which have so many elements together, the second with NaN if it has any.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the gradients.
    """
    sizes = [num_coordinates // 2, num_coordinates // 4, num_coordinates - num_coordinates // 2 - num_coordinates // 4]
    grads = [torch.randn(size, generator=generator, device=generator.device).to(device, dtype) for size in sizes]
    grads[1][-1:] = torch.nan
    count = torch.arange(3, device=device)
    return {"grads": grads, "counters": 7 * count, "seeds": fold(count, count)}


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
    return specialize(_finite_kernel, _constexprs(dtype, ALIGNMENT), OPTIONS, **TYPES, flags_ptr="*i8")


OP = make_op(__name__)
