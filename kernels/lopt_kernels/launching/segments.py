"""The segment table: one launch covers all tensors of a group, however many there are.

A segment is what one parameter brings: pointers to its tensors (parameter, state), sizes, its number among the launch's
parameters, and the row of a stack of meta-weights that it uses (deployment: 0; a population: one row per particle).
Programs are numbered through; each finds its segment by binary search over the segments' first block numbers.

    row of the table, int64:  pointers ... | sizes ... | index | slot of the meta-weights

What may change from step to step (gradients' addresses, rates, counters) is not in the table: see `parameters.Items`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lopt_kernels.launching.language import jit, tl

ALIGNMENT = 16  # bytes of the widest load; Triton's own notion of an aligned pointer
MAX_BLOCKS = 2**31 - 1  # of a launch's first dimension


@dataclass(frozen=True)
class Segment:
    """What one parameter brings.

    Attributes:
        tensors: contiguous, or dense with the same strides: column `i` has one dtype and one device in all segments.
        sizes: what the kernel has to know of their shapes; the first is usually the number of coordinates.
        index: the number of its parameter, for `parameters.Items`; a parameter may have several segments.
        slot: its row of the stacks of meta-weights.
    """

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    index: int = 0
    slot: int = 0


class Segments:
    """A table of segments on their device. It holds addresses, not tensors: these must stay where they are.

    Args:
        segments: at least one.
        count_blocks: sizes -> how many programs a segment gets; 0: it is left out. See `by_elements`.

    Attributes:
        table: int64 `[n, columns]`.
        starts: int64 `[n + 1]`, the first block of every segment, and the number of blocks.
        num_segments: n.
        num_pointers, columns: width of the table's first part and of all of it.
        num_blocks: the grid.
        num_items, num_slots: how many the launch needs at least (the largest number, and one).
        dtypes: of the tensors, column by column.
        align: the largest power of two, up to `ALIGNMENT`, that divides all pointers: for `load_pointer`.
        multiples: for each size the same, in all segments: for `load_size`.

    Raises:
        ValueError: there is no segment, columns differ in dtype or device or number, or there are too many blocks.
    """

    def __init__(self, segments: Sequence[Segment], count_blocks: Callable[[Any], int]) -> None:
        if not segments:
            raise ValueError("a launch needs at least one segment, got none. Skip the group.")
        first = segments[0]
        self.dtypes = tuple(t.dtype for t in first.tensors)
        device = first.tensors[0].device
        for i, segment in enumerate(segments):
            _check_alike(i, segment, self.dtypes, device, len(first.sizes))
        self.num_segments, self.num_pointers = len(segments), len(first.tensors)
        self.columns = self.num_pointers + len(first.sizes) + 2
        self.num_items = 1 + max(segment.index for segment in segments)
        self.num_slots = 1 + max(segment.slot for segment in segments)
        # cumulative numbers of blocks, which programs search for their own
        starts = [0]
        for segment in segments:
            starts.append(starts[-1] + count_blocks(segment.sizes))
        self.num_blocks = starts[-1]
        if self.num_blocks > MAX_BLOCKS:
            raise ValueError(f"{self.num_blocks} blocks are more than a launch takes ({MAX_BLOCKS}). Divide the group.")
        rows = [(*(t.data_ptr() for t in s.tensors), *s.sizes, s.index, s.slot) for s in segments]
        # the kernel is specialised to what divides all addresses and sizes, so that its loads may be wide
        self.align = find_alignment([pointer for row in rows for pointer in row[: self.num_pointers]])
        self.multiples = tuple(find_alignment(column) for column in zip(*(s.sizes for s in segments), strict=True))
        # table and starts are views of one tensor: one transfer to the device
        flat = upload([number for row in rows for number in row] + starts, torch.int64, device)
        self.table = flat[: -len(starts)].view(self.num_segments, self.columns)
        self.starts = flat[-len(starts) :]

    def constexprs(self) -> dict[str, Any]:
        """Compile-time constants of a kernel on this table: COLUMNS, ALIGN and MULTIPLE (of its first size).

        By the last two, loads through the table's addresses may be wide.
        """
        return {"COLUMNS": self.columns, "ALIGN": self.align, "MULTIPLE": self.multiples[0]}


def by_elements(block: int) -> Callable[[tuple[int, ...]], int]:
    """A `count_blocks` for tables whose first size is a number of elements, of which a program takes `block`.

    The last program of a segment may have fewer, an empty segment has none.
    """
    return lambda sizes: -(-sizes[0] // block)


def upload(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor `[len(numbers)]` on a device, which is not waited for.

    On a GPU it is copied from pinned memory, so that tables and rates can be sent while earlier launches run.
    """
    # only pinned memory is copied without waiting
    host = torch.tensor(numbers, dtype=dtype, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def find_alignment(numbers: Iterable[int]) -> int:
    """The largest power of two, up to `ALIGNMENT`, that divides all numbers, which are addresses or sizes.

    Kernels are specialised to it and may load as wide as it says. `ALIGNMENT` if there are none.
    """
    return gcd(ALIGNMENT, *numbers)


def _check_alike(i: int, segment: Segment, dtypes: tuple[Any, ...], device: torch.device, num_sizes: int) -> None:
    """A segment has the columns of the first."""
    found = tuple(t.dtype for t in segment.tensors)
    if found != dtypes or len(segment.sizes) != num_sizes:
        raise ValueError(
            f"segments of one launch must have the same dtypes and sizes: segment 0 has {dtypes} and {num_sizes} "
            f"sizes, segment {i} has {found} and {len(segment.sizes)}. Launch once per kind."
        )
    for tensor in segment.tensors:
        if tensor.device != device:
            raise ValueError(
                f"segment {i} has a tensor on {tensor.device}, segment 0 is on {device}. Launch once per device."
            )


@jit
def find_segment(starts, num_segments, block):
    """The segment of a block: the last that starts at or before it (empty ones start where the next does).

    A binary search in `starts`, int64 `[n + 1]`, which is ascending; the result is int64.
    """
    low = tl.cast(num_segments, tl.int32) * 0  # not a constant: the loop carries it
    high = tl.cast(num_segments, tl.int32)
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        before = tl.load(starts + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low.to(tl.int64)


@jit
def find_row(table, starts, num_segments, block, COLUMNS: tl.constexpr):
    """For a block: its segment, that segment's row of the table, and the block's number in the segment; int64.

    The row is a pointer to its first column. Nearly all programs over a table begin with it.
    """
    segment = find_segment(starts, num_segments, block)
    return segment, table + segment * COLUMNS, block.to(tl.int64) - tl.load(starts + segment)


@jit
def load_index(row, COLUMNS: tl.constexpr):
    """The number of a row's parameter, int64.

    It is where the parameter's gradient, rates and counter are in the arrays `[n]` of `parameters.Items`.
    """
    return tl.load(row + COLUMNS - 2)


@jit
def load_slot(row, COLUMNS: tl.constexpr):
    """A row's slot, int64: which set of a stack `[K, ...]` of meta-weights its tensor is stepped with."""
    return tl.load(row + COLUMNS - 1)


@jit
def load_pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address in a column of the row, as a pointer to DTYPE.

    ALIGN, of `Segments.align`, divides it, so that loads may be wide.
    """
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)), ALIGN)


@jit
def load_size(row, COLUMN: tl.constexpr, MULTIPLE: tl.constexpr):
    """The number in a column of the row, int64.

    MULTIPLE, its entry of `Segments.multiples`, divides it, so that rows of such a length may be loaded wide.
    """
    return tl.multiple_of(tl.load(row + COLUMN), MULTIPLE)
