"""One step of the coordinatewise two-layer LSTM, feature-major: every coordinate is a column.

Source: Andrychowicz et al. 2016, arXiv 1606.04474; cells and gate order (i, f, g, o) are those of
torch.nn.LSTMCell. Differs from the source: one bias per layer, no extra forget bias (it is part of
the bias's initial value).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.op import CompileSource, Op, check_triton, specialize

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference needs torch only
    triton = None

State = tuple[Tensor, Tensor, Tensor, Tensor]
STATE_NAMES = ("h1", "c1", "h2", "c2")
STATE_DTYPES = (torch.float32, torch.bfloat16)
TILES = {"ieee": 16, "tf32": 64}  # coordinates at once, by precision: what the registers hold without spills
BLOCK = 64  # coordinates per program of the kernels that update parameters
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MAX_WIDTH = 64  # of x and of the hidden vectors: wider tiles do not fit the registers


class LSTMWeights(NamedTuple):
    """Meta-weights; leading dimensions are absent (shared) or those of x (one set per slot)."""

    w_ih1: Tensor  # [..., 4H, F]
    w_hh1: Tensor  # [..., 4H, H]
    b1: Tensor  # [..., 4H]
    w_ih2: Tensor  # [..., 4H, H]
    w_hh2: Tensor  # [..., 4H, H]
    b2: Tensor  # [..., 4H]
    w_out: Tensor  # [..., 1, H]
    b_out: Tensor  # [..., 1]


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


if triton is not None:

    @triton.jit
    def sigmoid(x, FAST: tl.constexpr = False):
        """FAST: see `tanh`."""
        if FAST:
            return 0.5 * tanh(0.5 * x, FAST) + 0.5
        else:
            t = tl.exp(-tl.abs(x))
            return tl.where(x < 0, t, 1.0) / (1 + t)

    @triton.jit
    def tanh(x, FAST: tl.constexpr = False):
        """FAST: by NVIDIA's instruction, good to 2^-11; exponentials and divisions take longer than all else here."""
        if FAST:
            return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        else:
            t = tl.exp(-2 * tl.abs(x))
            far = tl.where(x < 0, t - 1, 1 - t) / (1 + t)
            s = x * x
            near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))  # 1 - t cancels here
            return tl.where(tl.abs(x) < 0.1, near, far)

    @triton.jit
    def compute_gate(
        gate, x, h, w_ih, w_hh, b, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
    ):  # x [PX, BLOCK], h [PH, BLOCK] -> [PH, BLOCK]
        unit = tl.arange(0, h.shape[0])
        in_unit = unit < H
        row = gate * H + unit.to(tl.int64)
        k = tl.arange(0, x.shape[0])
        w = tl.load(w_ih + (row * X)[:, None] + k, in_unit[:, None] & (k < X), 0.0)
        acc = tl.dot(w, x, input_precision=PRECISION)
        w = tl.load(w_hh + (row * H)[:, None] + unit, in_unit[:, None] & in_unit, 0.0)
        acc = tl.dot(w, h, acc, input_precision=PRECISION)
        return acc + tl.load(b + row, in_unit, 0.0)[:, None]

    @triton.jit
    def _lstm_cell(
        x, h, c, w_ih, w_hh, b, X: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr
    ):
        c = sigmoid(compute_gate(1, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST) * c  # f; this order keeps few alive
        i = sigmoid(compute_gate(0, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
        c += i * tanh(compute_gate(2, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
        o = sigmoid(compute_gate(3, x, h, w_ih, w_hh, b, X, H, PRECISION), FAST)
        in_unit = tl.arange(0, h.shape[0]) < H
        return tl.where(in_unit[:, None], o * tanh(c, FAST), 0.0), c  # 0 * inf made NaN of padded rows

    @triton.jit
    def count_tiles(size, block, BLOCK: tl.constexpr, TILES: tl.constexpr):
        """How many of a program's tiles have columns: the last block of a segment may have fewer."""
        count = TILES  # known for one tile: the loop goes
        if TILES > 1:
            count = tl.minimum(tl.cdiv(size - block * (BLOCK * TILES), BLOCK), TILES).to(tl.int32)
        return count

    @triton.jit
    def run_layers(
        x,  # [PF, BLOCK]
        state,  # pointers to (h1, c1, h2, c2), [H, N] each
        new_state,
        column,  # [BLOCK]
        in_column,
        num_coordinates,  # N
        weights,  # pointers, in the order of LSTMWeights
        F: tl.constexpr,
        H: tl.constexpr,
        PH: tl.constexpr,
        PRECISION: tl.constexpr,
        FAST: tl.constexpr,
    ):
        """Both layers for some columns: stores their new state and returns the output `[BLOCK]`."""
        h1_ptr, c1_ptr, h2_ptr, c2_ptr = state
        new_h1_ptr, new_c1_ptr, new_h2_ptr, new_c2_ptr = new_state
        w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
        unit = tl.arange(0, PH).to(tl.int64)
        at = (unit * num_coordinates)[:, None] + column  # [PH, BLOCK]
        mask = (unit < H)[:, None] & in_column
        h = tl.load(h1_ptr + at, mask, 0.0).to(tl.float32)
        c = tl.load(c1_ptr + at, mask, 0.0).to(tl.float32)
        h1, c = _lstm_cell(x, h, c, w_ih1, w_hh1, b1, F, H, PRECISION, FAST)
        tl.store(new_h1_ptr + at, h1.to(new_h1_ptr.dtype.element_ty), mask)
        tl.store(new_c1_ptr + at, c.to(new_c1_ptr.dtype.element_ty), mask)
        h = tl.load(h2_ptr + at, mask, 0.0).to(tl.float32)
        c = tl.load(c2_ptr + at, mask, 0.0).to(tl.float32)
        h2, c = _lstm_cell(h1, h, c, w_ih2, w_hh2, b2, H, H, PRECISION, FAST)
        tl.store(new_h2_ptr + at, h2.to(new_h2_ptr.dtype.element_ty), mask)
        tl.store(new_c2_ptr + at, c.to(new_c2_ptr.dtype.element_ty), mask)
        w = tl.load(w_out + unit, unit < H, 0.0)
        return tl.sum(w[:, None] * h2, axis=0) + tl.load(b_out)

    @triton.jit
    def find_slot(num_coordinates, BLOCK: tl.constexpr):
        """The slot of a program and its columns there: slots come one behind the other, each with its own blocks."""
        blocks = tl.cdiv(num_coordinates, BLOCK)
        slot = (tl.program_id(0) // blocks).to(tl.int64)
        return slot, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)

    @triton.jit
    def find_weights(weights, slot, F: tl.constexpr, H: tl.constexpr):
        """Pointers to a slot's weights from those to the stacks, in the order of LSTMWeights."""
        w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
        later, bias = slot * (4 * H * H), slot * (4 * H)
        w_ih1 += slot * (4 * H * F)
        return w_ih1, w_hh1 + later, b1 + bias, w_ih2 + later, w_hh2 + later, b2 + bias, w_out + slot * H, b_out + slot

    @triton.jit
    def _lstm_kernel(
        x_ptr,  # [S, F, N]
        h1_ptr, c1_ptr, h2_ptr, c2_ptr,  # [S, H, N]
        w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out,  # one set, or S of them with PER_SLOT
        out_ptr,  # [S, N]
        new_h1_ptr, new_c1_ptr, new_h2_ptr, new_c2_ptr,
        num_coordinates,  # N
        F: tl.constexpr, H: tl.constexpr,
        PF: tl.constexpr, PH: tl.constexpr,  # F and H padded to a power of two that tl.dot takes
        BLOCK: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, PER_SLOT: tl.constexpr,
    ):  # fmt: skip
        slot, column = find_slot(num_coordinates, BLOCK)
        in_column = column < num_coordinates
        feature = tl.arange(0, PF).to(tl.int64)
        x_at = ((slot * F + feature) * num_coordinates)[:, None] + column
        x = tl.load(x_ptr + x_at, (feature < F)[:, None] & in_column, 0.0)
        at = slot * H * num_coordinates
        state = (h1_ptr + at, c1_ptr + at, h2_ptr + at, c2_ptr + at)
        new_state = (new_h1_ptr + at, new_c1_ptr + at, new_h2_ptr + at, new_c2_ptr + at)
        weights = (w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out)
        if PER_SLOT:
            weights = find_weights(weights, slot, F, H)
        out = run_layers(x, state, new_state, column, in_column, num_coordinates, weights, F, H, PH, PRECISION, FAST)
        tl.store(out_ptr + slot * num_coordinates + column, out, in_column)


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
    """`reference` into `out`; tensors as `launch` takes them, but `[S, ...]`; weights may be, and are not checked."""
    count, dtype = x.shape[-1], state[0].dtype
    constants = constexprs(x.shape[-2], state[0].shape[-2], dtype)
    grid = (num_slots * triton.cdiv(count, constants["BLOCK"]),)  # Triton launches nothing for an empty grid
    with torch.cuda.device_of(x):
        _lstm_kernel[grid](
            *(x, *state, *weights, out[0], *out[1], count),
            **constants,
            PER_SLOT=weights.b_out.ndim > 1,
            **OPTIONS,
        )


def constexprs(num_features: int, hidden: int, dtype: torch.dtype, precision: str = "ieee") -> dict[str, Any]:
    """Compile-time constants of the kernels that call `run_layers`, for a state of `dtype`.

    Args:
        precision: of the inputs of products, "ieee" or "tf32"; with a bfloat16 state it is tf32. With tf32, hyperbolic
            tangents are NVIDIA's approximations, too.
    """
    padded = {
        "PF": max(16, triton.next_power_of_2(num_features)),
        "PH": max(16, triton.next_power_of_2(hidden)),
    }
    precision = precision if dtype == torch.float32 else "tf32"
    fast = precision == "tf32" and torch.version.hip is None and isinstance(sigmoid, triton.JITFunction)
    sizes = {"F": num_features, "H": hidden, **padded, "BLOCK": TILES[precision]}
    return sizes | {"PRECISION": precision, "FAST": fast}


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


def check_stacks(op: str, weights: LSTMWeights, num_features: int) -> None:
    """`weights` are stacks `[K, ...]` of meta-weights for `num_features`, whose layers fit the registers.

    Raises:
        ValueError: they are not.
    """
    hidden, count = weights.w_hh1.shape[-1], len(weights.w_hh1)
    if not 1 <= hidden <= MAX_WIDTH:
        raise ValueError(f"{op} kernel: H must be 1 to {MAX_WIDTH}, got {hidden}. Use the reference.")
    for name, stack, shape in zip(LSTMWeights._fields, weights, weight_shapes(num_features, hidden), strict=True):
        if stack.shape != (count, *shape):
            raise ValueError(f"{op} kernel: {name} must have shape {[count, *shape]}, got {list(stack.shape)}.")


def weight_shapes(num_features: int, hidden: int) -> tuple[tuple[int, ...], ...]:
    """Of the fields of `LSTMWeights`."""
    gates = 4 * hidden
    later, bias = (gates, hidden), (gates,)
    return (gates, num_features), later, bias, later, later, bias, (1, hidden), (1,)


def draw_weights(num_features: int, hidden: int, generator: torch.Generator, device: torch.device) -> LSTMWeights:
    """Random meta-weights with which some gates saturate."""
    drawn = [torch.randn(s, generator=generator, device=generator.device) for s in weight_shapes(num_features, hidden)]
    return LSTMWeights(*((w * hidden**-0.5).to(device) for w in drawn))


def draw_state(
    num_coordinates: int, hidden: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> State:
    """A state in the middle of a run; rows and columns differ in scale."""
    vectors = [draw_scaled(hidden, num_coordinates, generator) for _ in STATE_NAMES]
    h1, c1, h2, c2 = (
        (v.tanh() if name.startswith("h") else v).to(device, dtype)
        for name, v in zip(STATE_NAMES, vectors, strict=True)
    )
    return h1, c1, h2, c2


def draw_scaled(rows: int, num_coordinates: int, generator: torch.Generator) -> Tensor:
    """Numbers `[rows, N]`; rows and columns differ in scale by orders."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    return draw(rows, num_coordinates) * 10 ** (draw(rows, 1) + draw(num_coordinates) - 1)


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
    x = draw_scaled(num_features, num_coordinates, generator).to(device)
    state = draw_state(num_coordinates, hidden, generator, dtype, device)
    return {"x": x, "state": state, "weights": draw_weights(num_features, hidden, generator, device)}


def bytes_moved(num_coordinates: int, num_features: int = 2, hidden: int = 20, state_bytes: int = 4) -> int:
    """Bytes one step has to move: x, the state twice, out, and the weights once.

    `state_bytes` is the size of one number of the state.
    """
    per_coordinate = 4 * num_features + 2 * 4 * hidden * state_bytes + 4
    return num_coordinates * per_coordinate + 4 * count_weights(num_features, hidden)


def count_weights(num_features: int, hidden: int) -> int:
    """How many numbers `LSTMWeights` has."""
    return sum(prod(shape) for shape in weight_shapes(num_features, hidden))


def compile_source(dtype: torch.dtype, num_features: int = 2, hidden: int = 20) -> CompileSource:
    """The kernel specialised to a state of `dtype` and the given F and H."""
    constants = {**constexprs(num_features, hidden, dtype), "PER_SLOT": False}
    vectors = [f"{new}{name}_ptr" for new in ("", "new_") for name in STATE_NAMES]
    types = dict.fromkeys(vectors, "*fp32" if dtype == torch.float32 else "*bf16")
    return specialize(_lstm_kernel, constants, OPTIONS, num_coordinates="i32", **types)


OP = Op(
    name="lstm",
    reference=reference,
    launch=launch,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=STATE_DTYPES,
    block=BLOCK,
)
