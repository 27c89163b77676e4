"""Features of one element for the MLP rules: which ones there are, their definition, and how kernels make them.

Source: Metz et al. 2022, arXiv 2203.11860, and its descendants (VeLO 2211.09760, Celo 2501.12670, Celo2 2602.19142).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.feature_mlp.table import ALL_KINDS, BARE, STRIDED, VECTOR, WIDE, Tensors, divide_groups, load_several
from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, tl
from lopt_kernels.launching.parameters import Rates, clip, read_gradient

LINES = 3  # averages of g^2, one per decay
LINE_FEATURES = 2 * LINES  # they and their inverse roots
CLIP = 1000.0  # of the gradient, in the families with `clips`
LARGEST = 1e7  # in the others with second moments: beyond it the mean of v^2 = g^4 is not finite
SMALL_CLIP = 0.1
AVERAGE_EPS = 1e-9  # in the factor of g of a vector
LINE_EPS = 1e-8  # in the inverse roots of lines
SQUARE_EPS = 1e-30  # added to g^2 where it is averaged over lines


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
        """The gradient is clipped to plus and minus this number before anything is made of it.

        It is the published 1000 in families with `clips`; in others with second moments what keeps the mean of v^2
        finite; infinity in those without.
        """
        return CLIP if self.clips else LARGEST if self.factored else inf

    @property
    def kinds(self) -> int:
        """A bit, `1 << kind`, for each kind of segment that there can be, as kernels are compiled for these only.

        That is BARE alone without second moments, else all others.
        """
        return ALL_KINDS & ~(1 << BARE) if self.factored else 1 << BARE

    @property
    def num_features(self) -> int:
        """F, the features of each element: gradient, parameter, momenta and what second moments and lines make of them.

        In a matrix kernels multiply these alone for each element, and what lines add once for a row or a column.
        """
        return 2 + self.momenta if not self.factored else 13 + 2 * self.clips + LINES

    @property
    def num_inputs(self) -> int:
        """I, the inputs of the first layer: F element features and, with `factored`, 6 of either line.

        It is the width of the buffer of sums and of the folded first layer.
        """
        return self.num_features + 2 * LINE_FEATURES * self.factored

    @property
    def vector_inputs(self) -> int:
        """How many of the inputs a vector has: all, or with `bare_vectors` the element features but m F.

        The weights of the others are made 0 when a vector's first layer is folded.
        """
        return self.num_features - LINES if self.bare_vectors else self.num_inputs

    @property
    def p_index(self) -> int:
        """Which of the features is the parameter itself.

        The root of its mean square is what steps are relative to, with `fold.Network.relative`.
        """
        return 1 + (self.clips and self.factored)


class Inputs(NamedTuple):
    """What kernels have to know of a family, as numbers and flags under the names of its fields in capitals.

    F and INPUTS are its counts of element features and of inputs. Kernels get it as one compile-time constant, FAMILY.
    """

    MOMENTA: int
    FACTORED: bool
    CLIPS: bool
    RS_EPS: float
    VECTOR_EPS: float
    BOUND: float
    F: int
    INPUTS: int


def choose_inputs(family: Family) -> Inputs:
    """The compile-time constants that describe a family: numbers that a kernel would otherwise compute from it."""
    constants = (family.rs_eps, family.vector_eps, family.bound, family.num_features, family.num_inputs)
    return Inputs(family.momenta, family.factored, family.clips, *constants)


def make_constants(
    family: Family, dtypes: Sequence[torch.dtype], aligns: Sequence[int], kinds: int, sanitize: bool
) -> dict[str, Any]:
    """Compile-time constants that both passes over elements, `accumulate` and `mlp`, have.

    Args:
        dtypes: of parameters and gradients.
        aligns: see `table.find_aligns`.
        kinds: a bit for each kind of segment that there may be; what the family has not is left out.
        sanitize: entries of gradients that are not finite count as 0.
    Returns:
        By the names of the kernels' arguments.
    """
    return {
        **dict(zip(("ALIGN", "G_ALIGN", "WIDTH_ALIGN"), aligns, strict=True)),
        "P_TYPE": TRITON_TYPES[dtypes[0]],
        "G_TYPE": TRITON_TYPES[dtypes[1]],
        "KINDS": kinds & family.kinds,
        "FAMILY": choose_inputs(family),
        "SANITIZE": sanitize,
    }


# -- the formulas, on one tensor ---------------------------------------------------------------------------------------


def clip_gradient(g: Tensor, family: Family) -> Tensor:
    """The gradient that everything is computed from: within plus and minus `family.bound`; NaN stays NaN.

    Args:
        g: in fp32, as `read_gradient` returns it, of any shape.
    """
    return g.clamp(-family.bound, family.bound)


def element_features(g: Tensor, t: Tensors, family: Family) -> Tensor:
    """Features of each element in the order of `Family`, `[F, *shape]`, in fp32; the definition of `make_features`.

    Args:
        g: the clipped gradient `[*shape]`.
        t: with the new accumulators; a matrix with the scales of its lines.
    """
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
    """Features of a row or column average: averages `[3, ...]` and their inverse roots, together `[6, ...]`.

    The definition of `make_line_features`.
    """
    return torch.cat([line, (line + LINE_EPS).rsqrt()])


def all_features(t: Tensors, rates: Rates, family: Family, sanitize: bool = False) -> Tensor:
    """Inputs of the network for every element, in groups that are normalised together: `[F or I, groups, count]`.

    These are the element features and, where there are lines, those of both lines, broadcast.

    Args:
        t: with the new accumulators.
        rates: `[1]` each; the gradient's factor is used.
        sanitize: entries of g that are not finite count as 0.
    """
    g = clip_gradient(read_gradient(t.g, rates, sanitize), family)
    x = element_features(g, t, family)
    if t.first is not None and t.second is not None:
        x = torch.cat([x, *(line_features(line).expand(-1, *g.shape) for line in (t.first, t.second))])
    return divide_groups(x, t)


# -- in the kernels ----------------------------------------------------------------------------------------------------

_WIDE, _STRIDED, _VECTOR = constant(WIDE), constant(STRIDED), constant(VECTOR)
_LINES = constant(LINES)
_SMALL_CLIP = constant(SMALL_CLIP)
_AVERAGE_EPS, _LINE_EPS = constant(AVERAGE_EPS), constant(LINE_EPS)


@jit
def average(old, new, decay):
    """An accumulator moved towards a new value: torch.lerp(new, old, decay), by the same two formulas as torch.

    Torch goes from one to the other at a decay of 0.5; roundings are the same.
    """
    return tl.where(decay < 0.5, new + decay * (old - new), old - (old - new) * (1 - decay))


@jit
def multiply_pairs(a, b, COUNT: tl.constexpr):
    """a[i] * b[i] for i < COUNT: tuples of COUNT tiles or numbers, as features of several decays are kept."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (a[i] * b[i],)
    return result


@jit
def scale_all(a, x, COUNT: tl.constexpr):
    """a[i] * x for i < COUNT: a tuple of COUNT tiles, each times the same tile or number."""
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (a[i] * x,)
    return result


@jit
def invert_roots(a, EPS: tl.constexpr):
    """1 / sqrt(a[i] + EPS) of a line's three averages, one per decay: a tuple of as many tiles or numbers."""
    result = ()
    for i in tl.static_range(_LINES):
        result = result + (tl.rsqrt(a[i] + EPS),)
    return result


@jit
def make_line_features(line):
    """A line's averages, then 1 / their roots: `line_features` of one tile, as a tuple of 6."""
    return line + invert_roots(line, _LINE_EPS)


@jit
def make_factors(first, second, KIND: tl.constexpr, VECTOR_EPS: tl.constexpr):
    """Factors of g and of m in the factored features, a tuple of 3 each, one per decay.

    Those of vectors are made of their averages `first`; else both are the product of the scales of the lines.
    """
    if KIND == _VECTOR:
        return invert_roots(first, _AVERAGE_EPS), invert_roots(first, VECTOR_EPS)
    else:
        factor = multiply_pairs(first, second, _LINES)
        return factor, factor


@jit
def make_features(g, p, m, v, factor, factor_m, FAMILY: tl.constexpr):
    """The F features of a tile's elements, a tuple of vectors `[BLOCK]`: `element_features` of one tile.

    m, factor and factor_m are tuples, one entry per decay; with FACTORED off only g, p and m are read.
    """
    x = (g,)
    if FAMILY.FACTORED:
        rs = tl.rsqrt(v + FAMILY.RS_EPS)
        if FAMILY.CLIPS:
            x = x + (clip(g, _SMALL_CLIP),)
        x = x + (p,) + m + (v,) + scale_all(m, rs, FAMILY.MOMENTA) + (rs,) + scale_all(factor, g, _LINES)
        if FAMILY.CLIPS:
            x = x + (g * rs,)
        x = x + multiply_pairs(m, factor_m, _LINES)
    else:
        x = x + (p,) + m
    return x


@jit
def load_columns(pointers, lane, lengths):
    """What a matrix's columns bring, the same for all its rows: their scales, and the features of their line.

    A program of a WIDE segment loads both once, as tuples of 3 and of 6 vectors `[BLOCK]`, and walks down the rows.
    """
    _, _, _, _, second_ptr, _, scale_ptr = pointers
    _, _, length = lengths
    inside = lane < length
    scales = load_several(scale_ptr, lane, inside, length, _LINES)
    return scales, make_line_features(load_several(second_ptr, lane, inside, length, _LINES))


@jit
def load_row_features(pointers, where, lengths):
    """The features of the line of a matrix's row: 6 numbers, which all elements of the row share."""
    at = where[1]
    return make_line_features(load_several(pointers[3], at, at < lengths[1], lengths[1], _LINES))


@jit
def load_scales(pointers, columns, where, lengths, KIND: tl.constexpr):
    """Scales of both lines at the elements, tuples of 3; of a matrix those of its columns are at hand.

    In WIDE segments those of the first line are numbers, else each is a vector `[BLOCK]`.
    """
    _, first_at, second_at, mask = where
    _, first_length, second_length = lengths
    first_ptr, second_ptr = pointers[5], pointers[6]
    if KIND == _STRIDED:
        first = load_several(first_ptr, first_at, mask, first_length, _LINES)
        return first, load_several(second_ptr, second_at, mask, second_length, _LINES)
    else:
        return load_several(first_ptr, first_at, first_at < first_length, first_length, _LINES), columns


@jit
def append_lines(x, averages, pointers, where, lengths, KIND: tl.constexpr):
    """The features with those of both lines behind them, 6 each, where these are an element's own.

    In a matrix they are not: rows and columns come in through the first layer's bias.
    """
    _, first_at, second_at, mask = where
    _, first_length, second_length = lengths
    if KIND == _VECTOR:
        line = make_line_features(averages)
        x = x + line + line
    elif KIND == _STRIDED:
        x = x + make_line_features(load_several(pointers[3], first_at, mask, first_length, _LINES))
        x = x + make_line_features(load_several(pointers[4], second_at, mask, second_length, _LINES))
    return x
