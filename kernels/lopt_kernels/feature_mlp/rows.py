"""Rows of numbers that belong to tensors as a whole, put together for a schedule that sees all tensors, and put back.

Source: the state of VeLO's and Celo's recurrent schedulers (Metz et al. 2022, arXiv 2211.09760), one row per tensor.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import table_kernel, tl
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize
from lopt_kernels.launching.segments import Segment, Segments, load_index, load_pointer, load_size

BLOCK = 256  # numbers at once
STATE_DTYPES = (torch.float32,)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

Rows = tuple[Tensor, ...]


def reference(rows: Sequence[Rows]) -> Rows:
    """Each parameter's rows `[width]` of several kinds, put together: each kind's `[n, width]`, float32; pure.

    The definition of `gather`; `scatter` is its inverse.
    """
    return tuple(torch.stack(kind) for kind in zip(*rows, strict=True))


def make_table(rows: Sequence[tuple[int, Rows]]) -> Segments:
    """The table of parameters' rows, for `gather` and `scatter`: one program per parameter.

    Args:
        rows: each parameter's number among the items, and its row of each kind: float32, contiguous, and as wide in
            all.
    """
    made = [Segment(own, tuple(x.numel() for x in own), index) for index, own in rows]
    return Segments(made, lambda sizes: 1)


@table_kernel
def _rows_kernel(
    table,  # int64 [n, COLUMNS]: rows, widths, index, slot
    live_ptr,  # [items], or None: rows are read; else those that are live are written
    all_ptr,  # each kind's [items, width], one behind the other
    num_items,
    KINDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + tl.program_id(0).to(tl.int64) * COLUMNS
    index = load_index(row, COLUMNS)
    lane = tl.arange(0, BLOCK)
    for kind in tl.static_range(KINDS):
        own, width = load_pointer(row, kind, tl.float32, 1), load_size(row, KINDS + kind, 1)
        there = all_ptr + index * width
        all_ptr += num_items * width
        for start in range(0, width, BLOCK):
            at = start + lane
            if live_ptr is None:
                tl.store(there + at, tl.load(own + at, at < width), at < width)
            else:
                mask = at < tl.where(tl.load(live_ptr + index), width, 0)
                tl.store(own + at, tl.load(there + at, mask), mask)


def gather(table: Segments, widths: Sequence[int], num_items: int) -> Rows:
    """`reference`, in one launch.

    Args:
        table: of `make_table`, or several of them one after the other: what others write is left alone.
        widths: of the kinds.
        num_items: n.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    whole = torch.empty(num_items * sum(widths), dtype=torch.float32, device=table.table.device)
    _launch(table, None, whole, num_items)
    parts = whole.split([num_items * width for width in widths])
    return tuple(part.view(num_items, width) for part, width in zip(parts, widths, strict=True))


def scatter(table: Segments, rows: Sequence[Tensor], live: Tensor) -> None:
    """Write each kind's `[n, width]` back into the parameters' own rows, in one launch and a concatenation.

    Rows of parameters that are not live stay as they are.

    Args:
        table: of `make_table`.
        rows: float32, one tensor per kind.
        live: bool `[n]`.
    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    _launch(table, live, torch.cat([x.flatten() for x in rows]), len(live))


def _launch(table: Segments, live: Tensor | None, whole: Tensor, num_items: int) -> None:
    check_triton("rows", whole.device)
    with torch.cuda.device_of(whole):
        _rows_kernel[(table.num_segments,)](
            *(table.table, live, whole, num_items), **_constexprs(table.num_pointers), **OPTIONS
        )


def _constexprs(kinds: int) -> dict[str, Any]:
    return {"KINDS": kinds, "COLUMNS": 2 * kinds + 2, "BLOCK": BLOCK}


def launch(rows: Sequence[Rows]) -> Rows:
    """`reference` in one Triton launch, for rows that have no table yet; for tests and benchmarks.

    Raises:
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    return gather(make_table(list(enumerate(rows))), [x.numel() for x in rows[0]], len(rows))


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `launch`: VeLO's five kinds, for so many parameters as have these numbers together; at least one.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the rows, which is float32.
    """
    widths = (10, 10, 1, 512, 512)
    count = max(1, num_coordinates // sum(widths))
    drawn = torch.randn(count, sum(widths), generator=generator, device=generator.device, dtype=torch.float32).to(
        device
    )
    return {"rows": [tuple(x.clone() for x in row.split(widths)) for row in drawn]}


def bytes_moved(num_coordinates: int) -> int:
    """Bytes one launch has to move: each of so many float32 numbers is read once and written once.

    The table's pointers and widths are left out.
    """
    return 8 * num_coordinates


def compile_source(dtype: torch.dtype) -> CompileSource:
    """The kernel that reads five kinds of rows, as VeLO has them, to be compiled and inspected where no GPU is.

    Args:
        dtype: of the rows, which is float32.
    """
    constexprs = _constexprs(5) | {"live_ptr": None}
    return specialize(_rows_kernel, constexprs, OPTIONS, **parameters.TYPES, num_items="i32")


OP = make_op(__name__, launch_segments=gather)
