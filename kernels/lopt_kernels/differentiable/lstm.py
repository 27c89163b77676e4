"""The coordinatewise LSTM of `lstm`, differentiable: a fused forward and a fused backward pass over all slots.

The forward pass keeps inputs, states and new states, which a caller that goes on has anyway; the backward pass computes
the gates again from them. Its kernel writes the gradients of the gates before their nonlinearity: those of the weights
are products of these with what the gates were computed from, one batched product per matrix.

Memory of the backward pass beside its results: 32 H bytes per coordinate, the gradients of the gates of this one step,
which is twice a float32 state; nothing where no weight needs a gradient.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lopt_kernels.differentiable import autograd
from lopt_kernels.differentiable.autograd import DifferentiableOp, check_tensor, differentiate_once, flatten_slots
from lopt_kernels.elementwise import lstm, lstm_layers
from lopt_kernels.elementwise.lstm import OPTIONS
from lopt_kernels.elementwise.lstm_layers import (
    STATE_DTYPES,
    STATE_NAMES,
    LSTMWeights,
    State,
    compute_gate,
    find_slot,
    find_weights,
    reference,
    sigmoid,
    tanh,
)
from lopt_kernels.launching.language import jit, tl, triton
from lopt_kernels.launching.op import CompileSource, check_triton, specialize

NAME = "lstm"
BLOCK = 16  # coordinates per program of the backward pass: what the registers hold without spills
MAX_WIDTH = 32  # of x and of the hidden vectors, likewise


@jit
def _load(x_ptr, at, mask):
    return tl.load(x_ptr + at, mask, 0.0).to(tl.float32)


@jit
def _compute_gates(x, h, w_ih, w_hh, b, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """The gates (i, f, g, o) of one cell, `[PH, BLOCK]` each."""
    i = sigmoid(compute_gate(0, x, h, w_ih, w_hh, b, X, H, PRECISION))
    f = sigmoid(compute_gate(1, x, h, w_ih, w_hh, b, X, H, PRECISION))
    g = tanh(compute_gate(2, x, h, w_ih, w_hh, b, X, H, PRECISION))
    o = sigmoid(compute_gate(3, x, h, w_ih, w_hh, b, X, H, PRECISION))
    return i, f, g, o


@jit
def _differentiate_cell(dh, dc, c, t, i, f, g, o, in_unit):
    """Gradients of the gates before their nonlinearity and of the old c, from those of the new h and c.

    t is the tanh of the new c. Padded rows are made 0: 0 * inf made NaN of them.
    """
    dc += dh * o * (1 - t * t)
    di = tl.where(in_unit, dc * g * i * (1 - i), 0.0)
    df = tl.where(in_unit, dc * c * f * (1 - f), 0.0)
    dg = tl.where(in_unit, dc * i * (1 - g * g), 0.0)
    do = tl.where(in_unit, dh * t * o * (1 - o), 0.0)
    return (di, df, dg, do), dc * f


@jit
def _load_transposed(w, gate, X: tl.constexpr, H: tl.constexpr, PX: tl.constexpr, PH: tl.constexpr):
    """A gate's rows of a matrix `[4H, X]`: [PX, PH]."""
    unit, k = tl.arange(0, PH), tl.arange(0, PX)
    return tl.load(w + (gate * H + unit.to(tl.int64)) * X + k[:, None], (k < X)[:, None] & (unit < H), 0.0)


@jit
def _multiply_back(gates, w_ih, w_hh, dx, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr):
    """dx `[PX, BLOCK]` and, to be added to nothing, dh `[PH, BLOCK]` from the gradients of the four gates.

    What nobody stores is not computed: the compiler drops it.
    """
    dh = tl.zeros_like(gates[0])
    for gate in tl.static_range(4):  # both products in turn: one after the other takes twice the registers
        w = _load_transposed(w_ih, gate, X, H, dx.shape[0], dh.shape[0])
        dx = tl.dot(w, gates[gate], dx, input_precision=PRECISION)
        w = _load_transposed(w_hh, gate, H, H, dh.shape[0], dh.shape[0])
        dh = tl.dot(w, gates[gate], dh, input_precision=PRECISION)
    return dx, dh


@jit
def _store_gates(gates_ptr, gates, at, mask, num_coordinates, H: tl.constexpr):
    for gate in tl.static_range(4):
        tl.store(gates_ptr + gate * H * num_coordinates.to(tl.int64) + at, gates[gate], mask)


@jit
def _store_pair(h_ptr, c_ptr, h, c, at, mask):
    """Gradients of a layer's old state, where somebody wants them."""
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask)
        tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty), mask)


@jit
def _lstm_backward_kernel(
    x_ptr,  # [S, F, N]
    h1_ptr, c1_ptr, h2_ptr, c2_ptr,  # [S, H, N]: the old state
    w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out,  # one set, or S of them with PER_SLOT
    dout_ptr,  # [S, N]
    dnew_h1_ptr, dnew_c1_ptr, dnew_h2_ptr, dnew_c2_ptr,  # [S, H, N], or None: nobody used the new state
    dgates1_ptr, dgates2_ptr,  # [S, 4H, N], or None: no weight needs a gradient
    dx_ptr,  # [S, F, N] or None
    dh1_ptr, dc1_ptr, dh2_ptr, dc2_ptr,  # [S, H, N] or None
    num_coordinates,  # N
    F: tl.constexpr, H: tl.constexpr,
    PF: tl.constexpr, PH: tl.constexpr,  # F and H padded to a power of two that tl.dot takes
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, PER_SLOT: tl.constexpr,
):  # fmt: skip
    slot, column = find_slot(num_coordinates, BLOCK)
    in_column = column < num_coordinates
    weights = (w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out)
    if PER_SLOT:
        weights = find_weights(weights, slot, F, H)
    w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
    feature, unit = tl.arange(0, PF).to(tl.int64), tl.arange(0, PH).to(tl.int64)
    in_unit = (unit < H)[:, None]
    x_at, x_mask = ((slot * F + feature) * num_coordinates)[:, None] + column, (feature < F)[:, None] & in_column
    at, mask = ((slot * H + unit) * num_coordinates)[:, None] + column, in_unit & in_column
    gates_at = ((slot * (4 * H) + unit) * num_coordinates)[:, None] + column

    # both layers again
    x, h, c1 = _load(x_ptr, x_at, x_mask), _load(h1_ptr, at, mask), _load(c1_ptr, at, mask)
    i1, f1, g1, o1 = _compute_gates(x, h, w_ih1, w_hh1, b1, F, H, PRECISION)
    t1 = tanh(f1 * c1 + i1 * g1)
    h1 = tl.where(in_unit, o1 * t1, 0.0)  # 0 * inf made NaN of padded rows
    h, c2 = _load(h2_ptr, at, mask), _load(c2_ptr, at, mask)
    i, f, g, o = _compute_gates(h1, h, w_ih2, w_hh2, b2, H, H, PRECISION)
    t = tanh(f * c2 + i * g)

    # the second layer
    dout = _load(dout_ptr, slot * num_coordinates + column, in_column)
    dh = tl.load(w_out + unit, unit < H, 0.0)[:, None] * dout
    dc, dh1, dc1 = tl.zeros_like(dh), tl.zeros_like(dh), tl.zeros_like(dh)
    if dnew_h1_ptr is not None:
        dh += _load(dnew_h2_ptr, at, mask)
        dc += _load(dnew_c2_ptr, at, mask)
        dh1 += _load(dnew_h1_ptr, at, mask)
        dc1 += _load(dnew_c1_ptr, at, mask)
    dgates, dc = _differentiate_cell(dh, dc, c2, t, i, f, g, o, in_unit)
    if dgates2_ptr is not None:
        _store_gates(dgates2_ptr, dgates, gates_at, mask, num_coordinates, H)
    dh1, dh = _multiply_back(dgates, w_ih2, w_hh2, dh1, H, H, PRECISION)
    _store_pair(dh2_ptr, dc2_ptr, dh, dc, at, mask)

    # the first layer
    dgates, dc1 = _differentiate_cell(dh1, dc1, c1, t1, i1, f1, g1, o1, in_unit)
    if dgates1_ptr is not None:
        _store_gates(dgates1_ptr, dgates, gates_at, mask, num_coordinates, H)
    dx, dh = _multiply_back(dgates, w_ih1, w_hh1, tl.zeros([PF, BLOCK], tl.float32), F, H, PRECISION)
    _store_pair(dh1_ptr, dc1_ptr, dh, dc1, at, mask)
    if dx_ptr is not None:
        tl.store(dx_ptr + x_at, dx, x_mask)


def can_run(x: Tensor, state: State, weights: LSTMWeights) -> bool:
    """Whether meta-training should take `run_lstm` for these tensors rather than `reference`.

    It should where `autograd.can_differentiate` says so and neither features nor hidden vectors are wider than
    `MAX_WIDTH`, what the registers of the backward kernel hold.
    """
    widest = max(x.shape[-2], state[0].shape[-2])
    return widest <= MAX_WIDTH and autograd.can_differentiate(x, *state, *weights)


def run_lstm(x: Tensor, state: State, weights: LSTMWeights) -> tuple[Tensor, State]:
    """`lstm.reference` in one Triton launch, its gradient in another one and a few matrix products; of first order.

    Matrix products take their inputs as they are, but in tf32 in the forward pass for a bfloat16 state.

    Args:
        x: float32 `[*batch, F, N]`.
        state: (h1, c1, h2, c2), `[*batch, H, N]` each, all float32 or all bfloat16; their gradients have their dtype.
        weights: float32; leading dimensions are absent (shared) or can be expanded to `batch` (one set per slot).
    Returns:
        out float32 `[*batch, N]`, and the new state.
    Raises:
        ValueError: a shape, dtype or device the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on; or, in the backward
            pass of a backward pass, that there is none.
    """
    _check_inputs(x, state, weights)
    check_triton(NAME, x.device)
    batch, own = x.shape[:-2], [len(shape) for shape in lstm_layers.weight_shapes(1, 1)]
    per_slot = any(w.ndim > n for w, n in zip(weights, own, strict=True))
    sets = [flatten_slots(w, batch if per_slot else torch.Size(), n) for w, n in zip(weights, own, strict=True)]
    if not per_slot:
        sets = [w[0] for w in sets]
    tensors = [flatten_slots(t, batch, 2) for t in (x, *state)]
    out, *new_state = (t.reshape(*batch, *t.shape[1:]) for t in _LSTM.apply(*tensors, *sets))
    h1, c1, h2, c2 = new_state
    return out, (h1, c1, h2, c2)


class _LSTM(Function):
    """x `[S, F, N]`, state 4 x `[S, H, N]`, weights with or without S -> out `[S, N]` and the new state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, weights = _split(rest)
        h1, c1, h2, c2 = (torch.empty_like(s) for s in state)
        out = x.new_empty(x.shape[0], x.shape[2])
        lstm.launch_slots(len(x), x, state, weights, (out, (h1, c1, h2, c2)))
        ctx.save_for_backward(x, *rest, h1, h2)
        ctx.set_materialize_grads(False)
        return out, h1, c1, h2, c2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate_once(NAME, _differentiate, ctx.needs_input_grad, *ctx.saved_tensors, *grads)


def _split(rest: tuple[Any, ...]) -> tuple[State, LSTMWeights]:
    h1, c1, h2, c2 = rest[:4]
    return (h1, c1, h2, c2), LSTMWeights(*rest[4:12])


def _differentiate(needs: tuple[bool, ...], x: Tensor, *rest: Any) -> list[Tensor | None]:
    """Gradients of x, the old state and the weights, None where `needs` has False."""
    (state, weights), (new_h1, new_h2, dout, *dnew) = _split(rest), rest[12:]
    slots, features, count = x.shape
    hidden, dtype = state[0].shape[1], state[0].dtype
    dout = x.new_zeros(slots, count) if dout is None else dout.contiguous()
    # kernels without these inputs load less and compute less
    if all(d is None for d in dnew):  # the last step of a window
        dnew = [None] * 4
    else:
        dnew = [torch.zeros_like(s) if d is None else d.contiguous() for d, s in zip(dnew, state, strict=True)]
    dgates = [x.new_empty(slots, 4 * hidden, count) if any(needs[5:11]) else None for _ in range(2)]
    dx = torch.empty_like(x) if needs[0] else None
    dstate = [torch.empty_like(s) if any(needs[1:5]) else None for s in state]
    constants = _constexprs(features, hidden, dtype, weights.b_out.ndim > 1)
    if dx is not None or any(needs[1:11]):
        with torch.cuda.device_of(x):
            _lstm_backward_kernel[(slots * triton.cdiv(count, BLOCK),)](
                *(x, *state, *weights, dout, *dnew, *dgates, dx, *dstate, count), **constants, **OPTIONS
            )
    first, second = dgates
    # in the order of LSTMWeights: gradients of gates, and what the gates were products with
    pairs = [(first, x), (first, state[0]), (first, None), (second, new_h1), (second, state[2]), (second, None)]
    pairs += [(dout[:, None], new_h2), (dout[:, None], None)]
    dweights = [
        _multiply(d, other, shared=weights.b_out.ndim == 1) if need else None
        for need, (d, other) in zip(needs[5:], pairs, strict=True)
    ]
    return [dx, *(d if need else None for need, d in zip(needs[1:5], dstate, strict=True)), *dweights]


def _constexprs(num_features: int, hidden: int, dtype: torch.dtype, per_slot: bool) -> dict[str, Any]:
    """Compile-time constants of the backward pass."""
    _, sizes = lstm_layers.choose_sizes(num_features, hidden, dtype)
    constants = sizes._replace(PRECISION="ieee")._asdict()  # tiles for tensor cores spill
    del constants["FAST"]  # gradients are those of the functions themselves
    return {**constants, "BLOCK": BLOCK, "PER_SLOT": per_slot}


def _multiply(d: Tensor | None, other: Tensor | None, shared: bool) -> Tensor:
    """The gradient of a matrix from that of its product `[S, m, N]` and its factor `[S, k, N]`; of a bias without."""
    assert d is not None
    product = d.sum(-1) if other is None else d @ other.to(d.dtype).mT
    return product.sum(0) if shared else product


def _check_inputs(x: Tensor, state: State, weights: LSTMWeights) -> None:
    """The inputs are what `run_lstm` takes."""
    if x.ndim < 2 or state[0].ndim != x.ndim:
        raise ValueError(
            f"lstm kernel: x must be [*batch, F, N] and the state 4 x [*batch, H, N], got {list(x.shape)} "
            f"and {list(state[0].shape)}."
        )
    features, count = x.shape[-2:]
    hidden = state[0].shape[-2]
    if not (1 <= hidden <= MAX_WIDTH and 1 <= features <= MAX_WIDTH):
        raise ValueError(
            f"lstm kernel: F and H must be 1 to {MAX_WIDTH}, got F={features}, H={hidden}. Use the reference."
        )
    if state[0].dtype not in STATE_DTYPES:
        raise ValueError(
            f"lstm kernel: state must be torch.float32 or torch.bfloat16, h1 is {state[0].dtype}. Convert it."
        )
    check_tensor(NAME, "x", x, (features, count), torch.float32, x)
    for name, tensor in zip(STATE_NAMES, state, strict=True):
        check_tensor(NAME, name, tensor, (*x.shape[:-2], hidden, count), state[0].dtype, x)
    for name, tensor, shape in zip(
        LSTMWeights._fields, weights, lstm_layers.weight_shapes(features, hidden), strict=True
    ):
        check_tensor(NAME, name, tensor, shape, torch.float32, x)


def sample(
    num_slots: int,
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    num_features: int = 2,
    hidden: int = 20,
    per_slot: bool = False,
) -> tuple[Tensor, State, LSTMWeights]:
    """Arguments of `reference` and `run_lstm` for tests and benchmarks.

    They are what `elementwise.lstm.sample` draws, slot by slot.

    Args:
        generator: numbers are drawn on its device.
        dtype: of the state; x and the weights are float32.
        num_features, hidden: F and H.
        per_slot: every slot has weights `[S, ...]` of its own; else all have those of the first, without S.
    Returns:
        x `[S, F, N]`, the state (h1, c1, h2, c2), `[S, H, N]` each, and the weights.
    """
    size = (num_coordinates, generator, dtype, device, num_features, hidden)
    drawn: list[Any] = [lstm.sample(*size) for _ in range(num_slots)]
    h1, c1, h2, c2 = (torch.stack(tensors) for tensors in zip(*(d["state"] for d in drawn), strict=True))
    sets = [d["weights"] for d in drawn]
    weights = LSTMWeights(*(torch.stack(tensors) for tensors in zip(*sets, strict=True))) if per_slot else sets[0]
    return torch.stack([d["x"] for d in drawn]), (h1, c1, h2, c2), weights


def bytes_moved(
    num_slots: int, num_coordinates: int, num_features: int = 2, hidden: int = 20, state_bytes: int = 4
) -> tuple[int, int]:
    """Bytes of the forward pass (x, the state twice, out) and of the backward pass, weights left out.

    The backward pass reads x, the state and the gradients of the results, writes those of x and the state and, twice as
    large as a float32 state, those of the gates; it reads the latter again, with x, h1 and h2 old and new.
    """
    state = 4 * hidden * state_bytes
    forward = 4 * num_features + 2 * state + 4
    gates = 2 * 4 * hidden * 4
    backward = 4 * num_features * 3 + 3 * state + 4 + 2 * gates + state
    return num_slots * num_coordinates * forward, num_slots * num_coordinates * backward


def compile_sources(
    dtype: torch.dtype, num_features: int = 2, hidden: int = 20, per_slot: bool = False
) -> dict[str, CompileSource]:
    """The kernels of one step for a state of `dtype`, to be compiled and inspected where no GPU is.

    Those named `forward`, `backward` (with all its results) and `last`: the backward pass of a window's last step,
    whose new state nobody has used and whose features need no gradient.
    """
    forward = lstm.compile_source(dtype, num_features, hidden, per_slot)
    constants = _constexprs(num_features, hidden, dtype, per_slot)
    vectors = [f"{prefix}{name}_ptr" for prefix in ("", "dnew_", "d") for name in STATE_NAMES]
    types = dict.fromkeys(vectors, "*fp32" if dtype == torch.float32 else "*bf16") | {"num_coordinates": "i32"}
    backward = specialize(_lstm_backward_kernel, constants, OPTIONS, **types)
    without: dict[str, Any] = dict.fromkeys(["dx_ptr", *(f"dnew_{name}_ptr" for name in STATE_NAMES)])
    last = specialize(_lstm_backward_kernel, {**constants, **without}, OPTIONS, **types)
    return {"forward": forward, "backward": backward, "last": last}


OP = DifferentiableOp(
    name=NAME,
    reference=reference,
    run=run_lstm,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_sources=compile_sources,
    state_dtypes=STATE_DTYPES,
    block=BLOCK,
)
