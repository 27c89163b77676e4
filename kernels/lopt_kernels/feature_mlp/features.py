"""Features of one element for the MLP rules, how its row and column are found, and one parameter as a segment.

Source: Metz et al. 2022, arXiv 2203.11860, and its descendants (VeLO 2211.09760, Celo 2501.12670, Celo2 2602.19142).

A parameter with two factored axes is read as `[A, D1, B, D2, C]` (memory order; D1 and D2 the factored axes; A, B, C
the products of those before, between and behind). Its first line has one number for each index but D2's,
`[A, D1, B, C]`; its second line one for each index but D1's, `[A, B, D2, C]`. For a matrix: per row, and per column.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples, and tests constants apart from values)

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import constant, jit, tl
from lopt_kernels.launching.parameters import Items, Rates, read_gradient
from lopt_kernels.launching.segments import ALIGNMENT, Segment, Segments, load_size

LINES = 3  # averages of g^2, one per decay
LINE_FEATURES = 2 * LINES  # they and their inverse roots
CLIP = 1000.0  # of the gradient, in the families with `clips`
LARGEST = 1e7  # in the others with second moments: beyond it the mean of v^2 = g^4 is not finite
SMALL_CLIP = 0.1
AVERAGE_EPS = 1e-9  # in the factor of g of a vector
LINE_EPS = 1e-8  # in the inverse roots of lines
SQUARE_EPS = 1e-30  # added to g^2 where it is averaged over lines

# How a segment is walked through: what its factors come from, and whether a program stays in its columns.
WIDE, STRIDED, VECTOR, BARE = range(4)
NUM_KINDS, ALL_KINDS = 4, 15
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of parameters and gradients


class Family(NamedTuple):
    """Which features a rule has, in this order (those in brackets with `clips`; without `factored`: `g, p, m`):

    `g, [clip(g, 0.1)], p, m, v, m rs, rs, g F, [g rs], m F` with rs = 1/sqrt(v + rs_eps).

    Attributes:
        momenta: how many.
        factored: there are second moments.
        clips: see above; see `bound`, too.
        rs_eps: see above.
        vector_eps: added to a vector's averages in the factor of m.
        bare_vectors: of a vector neither m F nor its averages are inputs.
    """

    momenta: int = 3
    factored: bool = True
    clips: bool = False
    rs_eps: float = 1e-6
    vector_eps: float = 0.0
    bare_vectors: bool = False

    @property
    def bound(self) -> float:
        """The gradient is clipped to plus and minus this number."""
        return CLIP if self.clips else LARGEST if self.factored else inf

    @property
    def kinds(self) -> int:
        """A bit for each kind of segment that there can be."""
        return ALL_KINDS & ~(1 << BARE) if self.factored else 1 << BARE

    @property
    def num_features(self) -> int:
        """F, the element features."""
        return 2 + self.momenta if not self.factored else 13 + 2 * self.clips + LINES

    @property
    def num_inputs(self) -> int:
        """The first layer's inputs: element features, features of the first and of the second line."""
        return self.num_features + 2 * LINE_FEATURES * self.factored

    @property
    def vector_inputs(self) -> int:
        """How many of the inputs a vector has."""
        return self.num_features - LINES if self.bare_vectors else self.num_inputs

    @property
    def p_index(self) -> int:
        """The feature that is the parameter itself."""
        return 1 + (self.clips and self.factored)


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
        """Elements that are normalised together."""
        return self.p.numel() // self.groups


def split_shape(shape: tuple[int, ...], axes: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(A, D1, B, D2, C) of the module's docstring."""
    one, two = axes
    return prod(shape[:one]), shape[one], prod(shape[one + 1 : two]), shape[two], prod(shape[two + 1 :])


def find_kind(tensors: Tensors, block: int) -> int:
    """How a parameter is walked through: WIDE where one tile of columns is kept while walking down the rows."""
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
    columns = (t.p, t.m, *(t.m if x is None else x for x in t[3:8]))
    _, d1, b, d2, c = (1, 1, 1, ALIGNMENT, 1) if t.axes is None else split_shape(tuple(t.p.shape), t.axes)
    sizes = (t.group_size, find_kind(t, block), t.groups, d1, b, d2 * c, c)
    return [Segment(columns, (*sizes, group, t.inner, t.rows, place), index, t.slot) for group in range(t.groups)]


NUM_COLUMNS, NUM_SIZES = 7, 11  # of a segment
WIDTH = 5  # the size that is the length of a row; of a vector it says nothing


def find_aligns(segments: Segments, items: Items) -> tuple[int, int, int]:
    """What divides the addresses of parameters and state, those of gradients, and the lengths of rows."""
    return segments.align, items.align, segments.multiples[WIDTH]


def by_tiles(block: int, steps: int) -> Callable[[tuple[int, ...]], int]:
    """A `count_blocks`: a program takes `steps` times `block` elements, in WIDE segments one below the other."""

    def count_blocks(sizes: tuple[int, ...]) -> int:
        count, kind, width = sizes[0], sizes[1], sizes[5]
        if kind == WIDE and count:
            return -(-(count // width) // steps) * -(-width // block)
        return -(-count // (block * steps))

    return count_blocks


# -- the formulas, on one tensor ---------------------------------------------------------------------------------------


def clip_gradient(g: Tensor, family: Family) -> Tensor:
    """The gradient, in fp32, that everything is computed from."""
    return g.clamp(-family.bound, family.bound)


def element_features(g: Tensor, t: Tensors, family: Family) -> Tensor:
    """`[F, *shape]`, of the clipped gradient and the new accumulators."""
    p, m = t.p.float(), t.m
    if not family.factored:
        return torch.cat([g[None], p[None], m])
    assert t.v is not None, "`factored` means that there are second moments"
    rs = (t.v + family.rs_eps).rsqrt()
    assert t.first is not None, "and averages"
    if t.axes is None:
        factor, factor_m = (t.first + AVERAGE_EPS).rsqrt(), (t.first + family.vector_eps).rsqrt()
    else:
        assert t.first_scale is not None, "`fold_lines` has made it"
        assert t.second_scale is not None, "likewise"
        factor = factor_m = t.first_scale * t.second_scale
    clipped = [g[None].clamp(-SMALL_CLIP, SMALL_CLIP)] if family.clips else []
    last = [(g * rs)[None]] if family.clips else []
    return torch.cat([g[None], *clipped, p[None], m, t.v[None], m * rs, rs[None], g * factor, *last, m * factor_m])


def line_features(line: Tensor) -> Tensor:
    """Averages `[3, ...]` and their inverse roots: `[6, ...]`."""
    return torch.cat([line, (line + LINE_EPS).rsqrt()])


# -- in the kernels ----------------------------------------------------------------------------------------------------


def draw_group(
    shapes: Sequence[tuple[int, ...]],
    family: Family,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensors]:
    """Parameters of these shapes in the middle of a run; the first two axes are factored, and differ in scale.

    Args:
        generator: numbers are drawn on its device.
        dtype: of parameters and gradients.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def draw_positive(*shape: int) -> Tensor:
        return (10 ** (2 * draw(*shape) - 3)).to(device)

    group = []
    for shape in shapes:
        scale = draw(*shape)
        for axis, size in enumerate(shape):
            scale = scale * 10 ** draw(*[size if i == axis else 1 for i in range(len(shape))])
        p, g = draw(*shape).to(device, dtype), scale.to(device, dtype)
        t = Tensors(p, g, draw(family.momenta, *shape).to(device))
        if family.factored:
            t = t._replace(v=draw_positive(*shape))
        if family.factored and len(shape) < 2:
            averages = draw_positive(LINES, *shape)
            t = t._replace(first=averages, second=averages)
        elif family.factored:
            one, two = ((LINES, *(1 if i == axis else size for i, size in enumerate(shape))) for axis in (1, 0))
            t = t._replace(first=draw_positive(*one), second=draw_positive(*two), axes=(0, 1))
            t = t._replace(first_scale=draw_positive(*one), second_scale=draw_positive(*two))
        group.append(t)
    return group


def draw_decays(family: Family, device: torch.device) -> Tensor:
    """`[momenta + 4]`, on both sides of the two formulas that `torch.lerp` has."""
    momenta = [0.9, 0.99, 0.999, 0.5, 0.95, 0.1][: family.momenta]
    return torch.tensor([*momenta, 0.999, 0.9, 0.99, 0.999], device=device)


def all_features(t: Tensors, rates: Rates, family: Family, sanitize: bool = False) -> Tensor:
    """Element features and, where there are lines, those of both lines: `[F or I, groups, count]`."""
    g = clip_gradient(read_gradient(t.g, rates, sanitize), family)
    x = element_features(g, t, family)
    if t.first is not None and t.second is not None:
        x = torch.cat([x, *(line_features(line).expand(-1, *g.shape) for line in (t.first, t.second))])
    return divide_groups(x, t)


def divide_groups(x: Tensor, t: Tensors) -> Tensor:
    """`[k, *shape]` -> `[k, groups, count]`."""
    return x.reshape(len(x), -1, t.groups, t.inner).transpose(1, 2).flatten(2)


def join_groups(x: Tensor, t: Tensors) -> Tensor:
    """`[groups, count]` -> `[*shape]`."""
    return x.reshape(t.groups, -1, t.inner).transpose(0, 1).reshape(t.p.shape)


def divide_coordinates(num_coordinates: int, width: int = 64) -> list[tuple[int, ...]]:
    """Shapes of a matrix and a vector that have so many elements together."""
    return [(num_coordinates // width, width), (num_coordinates % width,)]


def name_constants(family: Family) -> dict[str, Any]:
    """The compile-time constants that describe a family."""
    return {
        "MOMENTA": family.momenta,
        "FACTORED": family.factored,
        "CLIPS": family.clips,
        "RS_EPS": family.rs_eps,
        "VECTOR_EPS": family.vector_eps,
        "BOUND": family.bound,
    }


_WIDE, _STRIDED, _VECTOR, _BARE = (constant(x) for x in (WIDE, STRIDED, VECTOR, BARE))
_LINES = constant(LINES)
_SMALL_CLIP = constant(SMALL_CLIP)
_AVERAGE_EPS, _LINE_EPS, _SQUARE_EPS = (constant(x) for x in (AVERAGE_EPS, LINE_EPS, SQUARE_EPS))
P, M, V, FIRST, SECOND, FIRST_SCALE, SECOND_SCALE = (constant(i) for i in range(7))


@jit
def clip(x, BOUND: tl.constexpr):
    """x within +-BOUND; NaN stays NaN."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@jit
def find_tile(
    row, local, SIZES: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """A program's first and last row + 1, and its columns; not WIDE: its blocks, and the lanes."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    if KIND == _WIDE:
        width = load_size(row, SIZES + 5, WIDTH)
        tiles = tl.cdiv(width, BLOCK)
        start, lane = local // tiles * STEPS, local % tiles * BLOCK + lane
        last = load_size(row, SIZES, 1) // width
    else:
        start = local * STEPS
        last = tl.cdiv(load_size(row, SIZES, 1), BLOCK)
    return start, tl.minimum(start + STEPS, last), lane


@jit
def find_elements(
    row, start, lane, live, SIZES: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets into the parameter and the lines, and what of them is there; WIDE: `start` is a row of the matrix.

    The offset into the first line is a number for WIDE segments, else one per lane. If not
    `live` nothing is there.
    """
    count = tl.where(live, load_size(row, SIZES, 1), 0)
    width = load_size(row, SIZES + 5, WIDTH)
    if KIND == _WIDE:
        at, first_at, second_at = start * width + lane, start, lane
        mask = lane < tl.multiple_of(tl.where(start * width < count, width, 0), WIDTH)
    else:
        element = start * BLOCK + lane
        mask = element < count
        at = element
        first_at, second_at = at, at
        if KIND == _STRIDED:
            groups = load_size(row, SIZES + 2, 1)
            if groups > 1:
                group, behind = load_size(row, SIZES + 7, 1), load_size(row, SIZES + 8, 1)
                at = element // behind * (groups * behind) + group * behind + element % behind
            inner, c = load_size(row, SIZES + 4, 1), load_size(row, SIZES + 6, 1)
            outer = at // width
            column = at - outer * width
            first_at = outer * c + column % c
            plane = load_size(row, SIZES + 3, 1) * inner
            second_at = (outer // plane * inner + outer % inner) * width + column
    return at, first_at, second_at, mask


@jit
def find_lengths(row, SIZES: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of the parameter, of its first line and of its second line."""
    numel = load_size(row, SIZES, 1) * load_size(row, SIZES + 2, 1)
    width = load_size(row, SIZES + 5, WIDTH)
    first, second = numel // width * load_size(row, SIZES + 6, 1), numel // load_size(row, SIZES + 3, 1)
    if KIND == _WIDE:  # whole rows
        numel, second = tl.multiple_of(numel, WIDTH), tl.multiple_of(second, WIDTH)
    return numel, first, second


@jit
def load_several(pointer, at, mask, stride, COUNT: tl.constexpr):
    """A tuple of COUNT loads, `stride` apart; 1 where nothing is: its root can be inverted."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (tl.load(pointer + i * stride + at, mask, 1.0),)
    return result


@jit
def average(old, new, decay):
    """torch.lerp(new, old, decay)."""
    return tl.where(decay < 0.5, new + decay * (old - new), old - (old - new) * (1 - decay))


@jit
def multiply_pairs(a, b, COUNT: tl.constexpr):
    """a[i] * b[i]."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (a[i] * b[i],)
    return result


@jit
def scale_all(a, x, COUNT: tl.constexpr):
    """a[i] * x."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (a[i] * x,)
    return result


@jit
def invert_roots(a, EPS: tl.constexpr):
    """1 / sqrt(a[i] + EPS), of lines."""
    result = ()
    for i in tl.static_range(_LINES):
        result = result + (tl.rsqrt(a[i] + EPS),)
    return result


@jit
def make_line_features(line):
    """See `line_features`."""
    return line + invert_roots(line, _LINE_EPS)


@jit
def make_factors(first, second, KIND: tl.constexpr, VECTOR_EPS: tl.constexpr):
    """Factors of g and of m; of vectors from their averages `first`, else from the scales of the lines."""
    if KIND == _VECTOR:
        return invert_roots(first, _AVERAGE_EPS), invert_roots(first, VECTOR_EPS)
    else:
        factor = multiply_pairs(first, second, _LINES)
        return factor, factor


@jit
def make_features(
    g, p, m, v, factor, factor_m, MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr,
    RS_EPS: tl.constexpr,
):  # fmt: skip
    """See `element_features`: a tuple of F vectors."""
    x = (g,)
    if FACTORED:
        rs = tl.rsqrt(v + RS_EPS)
        if CLIPS:
            x = x + (clip(g, _SMALL_CLIP),)
        x = x + (p,) + m + (v,) + scale_all(m, rs, MOMENTA) + (rs,) + scale_all(factor, g, _LINES)
        if CLIPS:
            x = x + (g * rs,)
        x = x + multiply_pairs(m, factor_m, _LINES)
    else:
        x = x + (p,) + m
    return x
