"""One step of the coordinatewise two-layer LSTM from given features to its output, for one flat set of coordinates.

Source: Andrychowicz et al. 2016, arXiv 1606.04474. It moves no parameter: meta-training takes it, whose slots have
features and weights of their own; `lopt_kernels.differentiable.lstm` is its backward pass.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from lopt_kernels.elementwise.lstm_layers import (
    BLOCK,
    MAX_WIDTH,
    STATE_DTYPES,
    STATE_NAMES,
    WARPS,
    LSTMWeights,
    State,
    choose_sizes,
    count_weights,
    draw_rows,
    draw_state,
    draw_weights,
    find_slot,
    find_weights,
    reference,
    run_layers,
    weight_shapes,
)
from lopt_kernels.launching.language import jit, tl, triton
from lopt_kernels.launching.op import CompileSource, check_triton, make_op, specialize

OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


@jit
def _lstm_kernel(
    x_ptr,  # [S, F, N]
    state,  # of (h1, c1, h2, c2), [S, H, N] each
    weights,  # in the order of LSTMWeights: one set, or S of them with PER_SLOT
    out_ptr,  # [S, N]
    new_state,
    num_coordinates,  # N
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_SLOT: tl.constexpr,
):
    slot, column = find_slot(num_coordinates, BLOCK)
    in_column = column < num_coordinates
    feature = tl.arange(0, SIZES.PF).to(tl.int64)
    x_at = ((slot * SIZES.F + feature) * num_coordinates)[:, None] + column
    x = tl.load(x_ptr + x_at, (feature < SIZES.F)[:, None] & in_column, 0.0)
    at = slot * SIZES.H * num_coordinates
    own, new = _shift(state, at), _shift(new_state, at)
    sets = weights
    if PER_SLOT:
        sets = find_weights(weights, slot, SIZES.F, SIZES.H)
    out = run_layers(x, own, new, (column, in_column, num_coordinates), sets, SIZES)
    tl.store(out_ptr + slot * num_coordinates + column, out, in_column)


@jit
def _shift(pointers, at):
    """Four pointers, each moved by as much."""
    return pointers[0] + at, pointers[1] + at, pointers[2] + at, pointers[3] + at


def launch(
    x: Tensor, state: State, weights: LSTMWeights, out: tuple[Tensor, State] | None = None
) -> tuple[Tensor, State]:
    """`reference` for one flat set of coordinates in one Triton launch; not differentiable.

    Matrix products take their inputs as they are for a float32 state and in tf32 for a bfloat16
    state; everything else is float32, with one rounding at the store.

    Args:
        x: float32 `[F, N]`.
        state: (h1, c1, h2, c2), `[H, N]` each, all float32 or all bfloat16.
        weights: float32, without leading dimensions.
        out: contiguous tensors to write to, new ones by default; they may be the state's own tensors
            (an update in place) and must not overlap anything else.
    Returns:
        out float32 `[N]`, and the new state.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take, or an input that
            requires a gradient.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    _check_inputs(x, state, weights)
    check_triton("lstm", x.device)
    if out is None:
        h1, c1, h2, c2 = (torch.empty_like(s) for s in state)
        out = x.new_empty(x.shape[-1]), (h1, c1, h2, c2)
    else:
        _check_out(out, x, state)
    launch_slots(1, x, state, weights, out)
    return out


def launch_slots(num_slots: int, x: Tensor, state: State, weights: LSTMWeights, out: tuple[Tensor, State]) -> None:
    """Run `reference` for S slots in one launch and write the results into `out`: the forward pass of meta-training.

    Args:
        x: float32 `[S, F, N]`, contiguous as all others; nothing is checked here.
        state: (h1, c1, h2, c2), `[S, H, N]` each.
        weights: one set for all slots, or with a leading dimension S.
        out: output `[S, N]` and new state `[S, H, N]`.
    """
    count = x.shape[-1]
    block, sizes = choose_sizes(x.shape[-2], state[0].shape[-2], state[0].dtype)
    with torch.cuda.device_of(x):
        _lstm_kernel[(num_slots * triton.cdiv(count, block),)](  # Triton launches nothing for an empty grid
            *(x, tuple(state), tuple(weights), out[0], tuple(out[1]), count),
            **{"SIZES": sizes, "BLOCK": block, "PER_SLOT": weights.b_out.ndim > 1, **OPTIONS},
        )


def _check_inputs(x: Tensor, state: State, weights: LSTMWeights) -> None:
    """The inputs are what `launch` takes."""
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(
            "lstm kernel: x must be one flat set of coordinates [F, N] with F >= 1, got "
            f"{list(x.shape)}. Launch one slot at a time, or use the reference for batches."
        )
    features, count = x.shape
    hidden = weights.w_hh1.shape[-1] if weights.w_hh1.ndim else 0
    if not (1 <= hidden <= MAX_WIDTH and features <= MAX_WIDTH):
        raise ValueError(
            f"lstm kernel: F and H must be 1 to {MAX_WIDTH}, got F={features}, H={hidden}. Use the reference."
        )
    if state[0].dtype not in STATE_DTYPES:
        raise ValueError(
            f"lstm kernel: state must be torch.float32 or torch.bfloat16, h1 is {state[0].dtype}. Convert it."
        )
    _check_tensor("x", x, (features, count), torch.float32, x)
    for name, tensor in zip(STATE_NAMES, state, strict=True):
        _check_tensor(name, tensor, (hidden, count), state[0].dtype, x)
    for name, tensor, shape in zip(LSTMWeights._fields, weights, weight_shapes(features, hidden), strict=True):
        _check_tensor(name, tensor, shape, torch.float32, x)
    # results would be detached without a word
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *weights)):
        raise ValueError(
            "lstm kernel: an input requires a gradient and the kernel has no backward. "
            "Call it under torch.no_grad(), or use the reference."
        )


def _check_out(out: tuple[Tensor, State], x: Tensor, state: State) -> None:
    """The tensors to write to are like the results."""
    _check_tensor("out", out[0], (x.shape[-1],), torch.float32, x)
    for name, new, old in zip(STATE_NAMES, out[1], state, strict=True):
        _check_tensor(f"new {name}", new, tuple(old.shape), old.dtype, x)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """`tensor` is a contiguous tensor of this shape and dtype on x's device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"lstm kernel: {name} must have shape {list(shape)}, got {list(tensor.shape)} "
            f"(x is {list(x.shape)}). Batched tensors and weights are the reference's."
        )
    if tensor.dtype != dtype:
        raise ValueError(f"lstm kernel: {name} must be {dtype}, got {tensor.dtype}. Convert it.")
    if tensor.device != x.device:
        raise ValueError(f"lstm kernel: {name} is on {tensor.device}, x on {x.device}. Move one of them.")
    if not tensor.is_contiguous():
        raise ValueError(
            f"lstm kernel: {name} must be contiguous, got strides {tensor.stride()} "
            f"for shape {list(shape)}. Call .contiguous()."
        )


def sample(
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    num_features: int = 2,
    hidden: int = 20,
) -> dict[str, object]:
    """Arguments of `reference` and `launch`; rows and columns differ in scale, some gates saturate.

    Args:
        num_coordinates: N, may be 0.
        generator: numbers are drawn on its device.
        dtype: of the state; x and the weights are float32.
        device: where the tensors go.
        num_features, hidden: F and H.
    Returns:
        `{"x": [F, N], "state": 4 tensors [H, N], "weights": LSTMWeights}`.
    """
    x = draw_rows(num_features, num_coordinates, generator).to(device)
    state = tuple(s.to(device, dtype) for s in draw_state(x[0], hidden, generator))
    weights = LSTMWeights(*(w.to(device) for w in draw_weights(num_features, hidden, generator)))
    return {"x": x, "state": state, "weights": weights}


def bytes_moved(num_coordinates: int, num_features: int = 2, hidden: int = 20, state_bytes: int = 4) -> int:
    """Bytes one step has to move at least: x, the state twice, out, and the weights once.

    Benchmarks compare a launch with the time that copying these takes.

    Args:
        num_features, hidden: F and H.
        state_bytes: the size of one number of the state.
    """
    per_coordinate = 4 * num_features + 2 * 4 * hidden * state_bytes + 4
    return num_coordinates * per_coordinate + 4 * count_weights(num_features, hidden)


def compile_source(
    dtype: torch.dtype, num_features: int = 2, hidden: int = 20, per_slot: bool = False
) -> CompileSource:
    """The kernel specialised to a state of `dtype` and to F and H, to be compiled and inspected where no GPU is.

    Args:
        num_features, hidden: F and H.
        per_slot: every slot has weights of its own.
    """
    block, sizes = choose_sizes(num_features, hidden, dtype)
    vectors = ("*fp32" if dtype == torch.float32 else "*bf16",) * len(STATE_NAMES)
    types = {"state": vectors, "new_state": vectors, "weights": ("*fp32",) * len(LSTMWeights._fields)}
    constants = {"SIZES": sizes, "BLOCK": block, "PER_SLOT": per_slot}
    return specialize(_lstm_kernel, constants, OPTIONS, num_coordinates="i32", **types)


OP = make_op(__name__, reference=reference, state_dtypes=STATE_DTYPES, block=BLOCK)
