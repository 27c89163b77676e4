"""One parameter as segments of a launch: its tensors, the table's columns by name, and how elements are found.

A parameter with two factored axes is read as `[A, D1, B, D2, C]` (memory order; D1 and D2 the factored axes; A, B, C
the products of those before, between and behind). Its first line has one number for each index but D2's,
`[A, D1, B, C]`; its second line one for each index but D1's, `[A, B, D2, C]`. For a matrix: per row, and per column.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import constant, jit, tl
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import ALIGNMENT, Segment, Segments, load_pointer, load_size

# How a segment is walked through: what its factors come from, and whether a program stays in its columns.
WIDE, STRIDED, VECTOR, BARE = range(4)
NUM_KINDS, ALL_KINDS = 4, 15
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters and gradients


class Tensors(NamedTuple):
    """One parameter with all that belongs to it; accumulators are fp32 and, like the rest, contiguous.

    Attributes:
        p, g: parameter and gradient `[*shape]`, fp32, bf16 or fp16; a scalar as `[1]`.
        m: momenta `[momenta, *shape]`.
        v: second moment `[*shape]`, of families with `factored`.
        first, second: averages of g^2 over D2 and over D1 `[3, *shape with 1 there]`; of a vector both are its
            averages. Of families with `factored`.
        first_scale, second_scale: their product is F; None for vectors.
        axes: D1 and D2, not negative; None: a vector.
        rows: which of the lines, 0 or 1, is the one whose scale is relative to its mean (the source's rows).
        groups: over so many positions features are not normalised together; 1: all elements are.
        inner: elements behind these positions; the parameter is read as `[X, groups, inner]`.
        slot: row of the stacks of meta-weights.
    """

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    first_scale: Tensor | None = None
    second_scale: Tensor | None = None
    axes: tuple[int, int] | None = None
    rows: int = 0
    groups: int = 1
    inner: int = 1
    slot: int = 0

    @property
    def group_size(self) -> int:
        """Elements that are normalised together: all, or those of one of the groups.

        Sums of squares are divided by it to make mean squares.
        """
        return self.p.numel() // self.groups


class Sizes(NamedTuple):
    """What kernels know of a segment's shape, in the order of the table's columns.

    Attributes:
        elements: of the segment.
        kind: how it is walked through.
        groups: how many segments the parameter has: positions over which features are not normalised together.
        d1, b, width, c: D1, B, D2 C and C of the module's docstring.
        group: which of the groups this is.
        inner: elements behind the positions.
        rows: which of the lines, 0 or 1, is the one whose scale is relative to its mean.
        place: of the parameter's step in a buffer, if steps are kept.
    """

    elements: int
    kind: int
    groups: int
    d1: int
    b: int
    width: int
    c: int
    group: int
    inner: int
    rows: int
    place: int


# Columns of a row of the table: pointers, sizes, index, slot.
NUM_POINTERS = 7
NUM_COLUMNS = NUM_POINTERS + len(Sizes._fields) + 2
P, M, V, FIRST, SECOND, FIRST_SCALE, SECOND_SCALE = (constant(i) for i in range(NUM_POINTERS))
ELEMENTS, KIND_OF, GROUPS, D1, B, WIDTH, C, GROUP, INNER, ROWS, PLACE = (
    constant(NUM_POINTERS + i) for i in range(len(Sizes._fields))
)
COLUMNS = constant(NUM_COLUMNS)


def split_shape(shape: tuple[int, ...], axes: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(A, D1, B, D2, C) of the module's docstring: a shape, read with its two factored axes apart.

    Args:
        shape: of the parameter, in memory order.
        axes: D1 before D2, as indices of the shape.
    """
    one, two = axes
    return prod(shape[:one]), shape[one], prod(shape[one + 1 : two]), shape[two], prod(shape[two + 1 :])


def find_kind(tensors: Tensors, block: int) -> int:
    """How a parameter is walked through by programs that take `block` elements at once.

    WIDE: down the rows of a matrix, with one tile of columns kept, where rows fill more than half a tile; STRIDED:
    other parameters with lines; VECTOR: those with averages of their own; BARE: those without second moments.
    """
    if tensors.first is None:
        return BARE
    if tensors.axes is None:
        return VECTOR
    a, _, b, d2, c = split_shape(tuple(tensors.p.shape), tensors.axes)
    return WIDE if a == b == c == tensors.groups == 1 and 2 * d2 > block else STRIDED


def make_segments(tensors: Tensors, index: int, block: int, place: int = 0) -> list[Segment]:
    """A parameter's segments, one per group of its normalisation.

    Args:
        index: the parameter's number.
        block: elements that a program takes at once.
        place: of the parameter's step in a buffer, if steps are kept.
    """
    t = tensors
    # a column must hold an address even where there is no tensor: m's, which is not read from there
    pointers = (t.p, t.m, *(t.m if x is None else x for x in t[3:8]))
    _, d1, b, d2, c = (1, 1, 1, ALIGNMENT, 1) if t.axes is None else split_shape(tuple(t.p.shape), t.axes)
    sizes = Sizes(t.group_size, find_kind(t, block), t.groups, d1, b, d2 * c, c, 0, t.inner, t.rows, place)
    return [Segment(pointers, sizes._replace(group=group), index, t.slot) for group in range(t.groups)]


def find_aligns(segments: Segments, items: Items) -> tuple[int, int, int]:
    """What divides the addresses of parameters and state, those of gradients, and the lengths of rows: for wide loads.

    The width of a vector says nothing: it is a multiple of everything.
    """
    return segments.align, items.align, segments.multiples[Sizes._fields.index("width")]


def by_tiles(block: int, steps: int) -> Callable[[Sizes], int]:
    """A `count_blocks` for tables of `make_segments`: a program takes `steps` times `block` elements.

    In WIDE segments it takes `steps` rows of a tile of `block` columns, one below the other.
    """

    def count_blocks(sizes: Sizes) -> int:
        # rounded up in both directions: the last tiles may have fewer rows or columns
        if sizes.kind == WIDE and sizes.elements:
            return -(-(sizes.elements // sizes.width) // steps) * -(-sizes.width // block)
        return -(-sizes.elements // (block * steps))

    return count_blocks


def divide_groups(x: Tensor, t: Tensors) -> Tensor:
    """Elements in groups that are normalised together: `[k, *shape]` -> `[k, groups, count]`, any dtype.

    Group i has the elements at position i of `groups`, with any index before and behind it.
    """
    return x.reshape(len(x), -1, t.groups, t.inner).transpose(1, 2).flatten(2)


def join_groups(x: Tensor, t: Tensors) -> Tensor:
    """Undo `divide_groups` for one tensor: `[groups, count]` -> `[*shape]`, the shape of the parameter."""
    return x.reshape(t.groups, -1, t.inner).transpose(0, 1).reshape(t.p.shape)


# -- in the kernels ----------------------------------------------------------------------------------------------------

_WIDE, _STRIDED, _NUM_POINTERS = constant(WIDE), constant(STRIDED), constant(NUM_POINTERS)


@jit
def find_pointers(row, P_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Of a row, in the order of its columns: parameter, momenta, second moment, lines, and their scales.

    A tuple of pointers; all but the parameter's, P_TYPE, are to fp32.
    """
    pointers = (load_pointer(row, P, P_TYPE, ALIGN),)
    for column in tl.static_range(1, _NUM_POINTERS):
        pointers = pointers + (load_pointer(row, column, tl.float32, ALIGN),)
    return pointers


@jit
def find_tile(
    row, local, KIND: tl.constexpr, WIDTH_ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """What a program walks through: its first step, its last + 1, and its lanes, int64 `[BLOCK]`.

    WIDE: steps are rows of the matrix and lanes are columns; else steps are blocks and lanes are elements of one.
    """
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if KIND == _WIDE:
        width = load_size(row, WIDTH, WIDTH_ALIGN)
        tiles = tl.cdiv(width, BLOCK)
        start, lane = local // tiles * STEPS, local % tiles * BLOCK + lane
        last = load_size(row, ELEMENTS, 1) // width
    else:
        start = local * STEPS
        last = tl.cdiv(load_size(row, ELEMENTS, 1), BLOCK)
    return start, tl.minimum(start + STEPS, last), lane


@jit
def find_elements(row, start, lane, live, KIND: tl.constexpr, WIDTH_ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets into the parameter and the lines, and what of them is there; WIDE: `start` is a row of the matrix.

    The offset into the first line is a number for WIDE segments, else one per lane. If not
    `live` nothing is there.
    """
    count = tl.where(live, load_size(row, ELEMENTS, 1), 0)
    width = load_size(row, WIDTH, WIDTH_ALIGN)
    if KIND == _WIDE:
        at, first_at, second_at = start * width + lane, start, lane
        mask = lane < tl.multiple_of(tl.where(start * width < count, width, 0), WIDTH_ALIGN)
    else:
        element = start * BLOCK + lane
        mask = element < count
        at = element
        first_at, second_at = at, at
        if KIND == _STRIDED:
            groups = load_size(row, GROUPS, 1)
            if groups > 1:
                group, behind = load_size(row, GROUP, 1), load_size(row, INNER, 1)
                at = element // behind * (groups * behind) + group * behind + element % behind
            inner, c = load_size(row, B, 1), load_size(row, C, 1)
            outer = at // width
            column = at - outer * width
            first_at = outer * c + column % c
            plane = load_size(row, D1, 1) * inner
            second_at = (outer // plane * inner + outer % inner) * width + column
    return at, first_at, second_at, mask


@jit
def find_lengths(row, KIND: tl.constexpr, WIDTH_ALIGN: tl.constexpr):
    """Numbers of the parameter, of its first line and of its second line.

    Accumulators of one decay lie so far behind those of another.
    """
    numel = load_size(row, ELEMENTS, 1) * load_size(row, GROUPS, 1)
    width = load_size(row, WIDTH, WIDTH_ALIGN)
    first, second = numel // width * load_size(row, C, 1), numel // load_size(row, D1, 1)
    if KIND == _WIDE:  # whole rows
        numel, second = tl.multiple_of(numel, WIDTH_ALIGN), tl.multiple_of(second, WIDTH_ALIGN)
    return numel, first, second


@jit
def load_several(pointer, at, mask, stride, COUNT: tl.constexpr):
    """A tuple of COUNT loads at the same offsets, `stride` apart: one per decay.

    1 where nothing is: its root can be inverted.
    """
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (tl.load(pointer + i * stride + at, mask, 1.0),)
    return result
