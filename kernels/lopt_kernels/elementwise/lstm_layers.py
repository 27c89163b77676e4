"""Two LSTM layers and an output layer for every coordinate, feature-major: a coordinate is a column.

Source: Andrychowicz et al. 2016, arXiv 1606.04474; cells and gate order (i, f, g, o) are those of torch.nn.LSTMCell.
Differs from the source: one bias per layer, no extra forget bias (it is part of the bias's initial value).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import INTERPRETED, jit, tl, triton

State = tuple[Tensor, Tensor, Tensor, Tensor]
STATE_NAMES = ("h1", "c1", "h2", "c2")
STATE_DTYPES = (torch.float32, torch.bfloat16)
TILES = {"ieee": 16, "tf32": 64}  # coordinates at once, by precision: what the registers hold without spills
BLOCK = 64  # coordinates per program of the kernels that update parameters
WARPS = 8
MAX_WIDTH = 64  # of x and of the hidden vectors: wider tiles do not fit the registers


class LSTMWeights(NamedTuple):
    """Meta-weights of both layers and the output layer, for F features and H units; gates in the order (i, f, g, o).

    Leading dimensions are absent (one set for all coordinates) or those of x (one set per slot). Float32 in kernels;
    the reference takes the dtype of x.
    """

    w_ih1: Tensor  # [..., 4H, F]
    w_hh1: Tensor  # [..., 4H, H]
    b1: Tensor  # [..., 4H]
    w_ih2: Tensor  # [..., 4H, H]
    w_hh2: Tensor  # [..., 4H, H]
    b2: Tensor  # [..., 4H]
    w_out: Tensor  # [..., 1, H]
    b_out: Tensor  # [..., 1]

    @property
    def hidden(self) -> int:
        """H, the width of both layers.

        By it `Formula.list_weight_shapes` and the checks of a launch know the shapes of all other weights.
        """
        return self.w_hh1.shape[-1]


class Sizes(NamedTuple):
    """What the layers are compiled for.

    Attributes:
        F, H: features, and width of the layers.
        PF, PH: the same, padded to a power of two that `tl.dot` takes.
        PRECISION: of the inputs of products, "ieee" or "tf32".
        FAST: hyperbolic tangents are NVIDIA's approximations.
    """

    F: int
    H: int
    PF: int
    PH: int
    PRECISION: str
    FAST: bool


def reference(x: Tensor, state: State, weights: LSTMWeights) -> tuple[Tensor, State]:
    """Both layers and the output layer; pure, differentiable twice in every argument.

    Args:
        x: features `[..., F, N]`; arithmetic is done in its dtype.
        state: (h1, c1, h2, c2), `[..., H, N]` each; may be of lower precision than x.
        weights: in the dtype of x.
    Returns:
        out `[..., N]` in the dtype of x, and the new state in the dtype of `state` (rounded once,
        at the end).
    """
    h1, c1, h2, c2 = (s.to(x.dtype) for s in state)
    h1, c1 = _cell(x, h1, c1, weights.w_ih1, weights.w_hh1, weights.b1)
    h2, c2 = _cell(h1, h2, c2, weights.w_ih2, weights.w_hh2, weights.b2)
    out = _matmul(weights.w_out, h2).squeeze(-2) + weights.b_out
    dtype = state[0].dtype
    return out, (h1.to(dtype), c1.to(dtype), h2.to(dtype), c2.to(dtype))


def _cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One LSTM cell: the new h and c, `[..., H, N]`."""
    gates = _matmul(w_ih, x)
    gates += _matmul(w_hh, h)  # in place on fresh products: autograd does not need their values
    gates += b[..., None]
    i, f, g, o = gates.chunk(4, -2)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _matmul(w: Tensor, x: Tensor) -> Tensor:
    """`w @ x` as one bmm over x's leading dimensions."""
    return torch.matmul(w.expand(*x.shape[:-2], *w.shape[-2:]), x)


@jit
def sigmoid(x, FAST: tl.constexpr = False):
    """1 / (1 + exp(-x)) of a tile, without overflow on either side.

    With FAST from the hardware's `tanh`, as precise as that.
    """
    if FAST:
        return 0.5 * tanh(0.5 * x, FAST) + 0.5
    else:
        t = tl.exp(-tl.abs(x))
        return tl.where(x < 0, t, 1.0) / (1 + t)


@jit
def tanh(x, FAST: tl.constexpr = False):
    """Hyperbolic tangent of a tile, by exponentials, and by a series near 0, where they cancel.

    FAST: by NVIDIA's instruction, good to 2^-11; exponentials and divisions take longer than all else here.
    """
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        t = tl.exp(-2 * tl.abs(x))
        far = tl.where(x < 0, t - 1, 1 - t) / (1 + t)
        s = x * x
        near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))  # 1 - t cancels here
        return tl.where(tl.abs(x) < 0.1, near, far)


@jit
def compute_gate(
    gate, x, h, w_ih, w_hh, b, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
):  # x [PX, BLOCK], h [PH, BLOCK] -> [PH, BLOCK]
    """One gate of a layer before its nonlinearity, `W_ih x + W_hh h + b`, `[PH, BLOCK]`.

    x is `[PX, BLOCK]`, h `[PH, BLOCK]`; weights are pointers to `[4H, X]`, `[4H, H]` and `[4H]`, of whose rows gate 0
    to 3 selects H. Forward and backward kernels share it.
    """
    unit = tl.arange(0, h.shape[0])
    in_unit = unit < H
    row = gate * H + unit.to(tl.int64)
    k = tl.arange(0, x.shape[0])
    w = tl.load(w_ih + (row * X)[:, None] + k, in_unit[:, None] & (k < X), 0.0)
    acc = tl.dot(w, x, input_precision=PRECISION)
    w = tl.load(w_hh + (row * H)[:, None] + unit, in_unit[:, None] & in_unit, 0.0)
    acc = tl.dot(w, h, acc, input_precision=PRECISION)
    return acc + tl.load(b + row, in_unit, 0.0)[:, None]


@jit
def _lstm_cell(x, h, c, w_ih, w_hh, b, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    c = sigmoid(compute_gate(1, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST) * c  # f; this order keeps few alive
    i = sigmoid(compute_gate(0, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
    c += i * tanh(compute_gate(2, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
    o = sigmoid(compute_gate(3, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
    in_unit = tl.arange(0, h.shape[0]) < H
    return tl.where(in_unit[:, None], o * tanh(c, FAST), 0.0), c  # 0 * inf made NaN of padded rows


@jit
def run_layers(x, state, new_state, where, weights, SIZES: tl.constexpr):
    """Both layers for some columns: stores their new state and returns the output `[BLOCK]`.

    x is `[PF, BLOCK]`; state and new_state are pointers to (h1, c1, h2, c2), `[H, N]` each; where: columns, which of
    them are there, and N; weights are pointers, in the order of LSTMWeights.
    """
    H: tl.constexpr = SIZES.H
    PRECISION: tl.constexpr = SIZES.PRECISION  # Triton 3.6 does not take a text out of a tuple as an argument
    column, in_column, num_coordinates = where
    h1_ptr, c1_ptr, h2_ptr, c2_ptr = state
    new_h1_ptr, new_c1_ptr, new_h2_ptr, new_c2_ptr = new_state
    w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
    unit = tl.arange(0, SIZES.PH).to(tl.int64)
    at = (unit * num_coordinates)[:, None] + column  # [PH, BLOCK]
    mask = (unit < H)[:, None] & in_column
    h = tl.load(h1_ptr + at, mask, 0.0).to(tl.float32)
    c = tl.load(c1_ptr + at, mask, 0.0).to(tl.float32)
    h1, c = _lstm_cell(x, h, c, w_ih1, w_hh1, b1, SIZES.F, H, PRECISION, SIZES.FAST)
    tl.store(new_h1_ptr + at, h1.to(new_h1_ptr.dtype.element_ty), mask)
    tl.store(new_c1_ptr + at, c.to(new_c1_ptr.dtype.element_ty), mask)
    h = tl.load(h2_ptr + at, mask, 0.0).to(tl.float32)
    c = tl.load(c2_ptr + at, mask, 0.0).to(tl.float32)
    h2, c = _lstm_cell(h1, h, c, w_ih2, w_hh2, b2, H, H, PRECISION, SIZES.FAST)
    tl.store(new_h2_ptr + at, h2.to(new_h2_ptr.dtype.element_ty), mask)
    tl.store(new_c2_ptr + at, c.to(new_c2_ptr.dtype.element_ty), mask)
    w = tl.load(w_out + unit, unit < H, 0.0)
    return tl.sum(w[:, None] * h2, axis=0) + tl.load(b_out)


@jit
def find_slot(num_coordinates, BLOCK: tl.constexpr):
    """The slot of a program and its columns there, int64 `[BLOCK]`.

    Slots come one behind the other, each with its own blocks, so that one launch takes any number of them.
    """
    blocks = tl.cdiv(num_coordinates, BLOCK)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    return slot, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@jit
def find_weights(weights, slot, F: tl.constexpr, H: tl.constexpr):
    """Pointers to one slot's weights from those to the stacks `[S, ...]`, in the order of LSTMWeights.

    Only where each slot has weights of its own, which kernels are told by PER_SLOT.
    """
    w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
    later, bias = slot * (4 * H * H), slot * (4 * H)
    w_ih1 += slot * (4 * H * F)
    return w_ih1, w_hh1 + later, b1 + bias, w_ih2 + later, w_hh2 + later, b2 + bias, w_out + slot * H, b_out + slot


def choose_sizes(num_features: int, hidden: int, dtype: torch.dtype, precision: str = "ieee") -> tuple[int, Sizes]:
    """How many coordinates a program takes at once, and what its layers are compiled for, for a state of `dtype`.

    Args:
        precision: of the inputs of products, "ieee" or "tf32"; with a bfloat16 state it is tf32. With tf32, hyperbolic
            tangents are NVIDIA's approximations, too.
    """
    precision = precision if dtype == torch.float32 else "tf32"
    fast = precision == "tf32" and torch.version.hip is None and not INTERPRETED
    padded_features, padded_hidden = (max(16, triton.next_power_of_2(size)) for size in (num_features, hidden))
    return TILES[precision], Sizes(num_features, hidden, padded_features, padded_hidden, precision, fast)


def weight_shapes(num_features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of one set of `LSTMWeights`, field by field.

    Launches check tensors against them, and samples are drawn in them.

    Args:
        num_features: F, inputs of the first layer.
        hidden: H, width of both layers.
    """
    gates = 4 * hidden
    later, bias = (gates, hidden), (gates,)
    return (gates, num_features), later, bias, later, later, bias, (1, hidden), (1,)


def count_weights(num_features: int, hidden: int) -> int:
    """How many numbers one set of `LSTMWeights` has for F features and H units, all layers and biases together.

    The part of a launch's bytes that does not grow with coordinates.
    """
    return sum(prod(shape) for shape in weight_shapes(num_features, hidden))


def state_shapes(hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the state of one coordinate, in the order of `STATE_NAMES`: h and c of both layers, `(hidden,)` each.

    The dimension of coordinates follows them.
    """
    return ((hidden,),) * len(STATE_NAMES)


def draw_weights(num_features: int, hidden: int, generator: torch.Generator) -> LSTMWeights:
    """Random meta-weights for tests and benchmarks, float32 on the generator's device.

    Normal numbers over the root of H, with which some gates saturate. Launches on them are compared with the reference.
    """
    shapes = weight_shapes(num_features, hidden)
    drawn = [torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32) for shape in shapes]
    return LSTMWeights(*(w * hidden**-0.5 for w in drawn))


def draw_state(scale: Tensor, hidden: int, generator: torch.Generator) -> State:
    """A state in the middle of a run for tests and benchmarks.

    h1 and h2 within +-1, as outputs of cells are, c1 and c2 of any size; rows and columns differ in scale by orders.

    Args:
        scale: `[N]`; its length is used alone.
    Returns:
        (h1, c1, h2, c2), `[H, N]` each.
    """
    h1, c1, h2, c2 = (draw_rows(hidden, len(scale), generator) for _ in STATE_NAMES)
    return h1.tanh(), c1, h2.tanh(), c2


def draw_rows(rows: int, num_coordinates: int, generator: torch.Generator) -> Tensor:
    """Random numbers `[rows, N]` whose rows and columns differ in scale by orders.

    So a kernel that mixes up coordinates or units does not equal its reference, by far.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    return draw(rows, num_coordinates) * 10 ** (draw(rows, 1) + draw(num_coordinates) - 1)
