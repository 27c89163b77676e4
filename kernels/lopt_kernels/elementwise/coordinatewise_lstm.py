"""The coordinatewise LSTM rule over all segments: gradient in, log/sign features, two LSTM layers, parameter out.

Source: Andrychowicz et al. 2016, arXiv 1606.04474, and its published code (preprocessing with k = 5). It is lopt's rule
"lstm" under the terms that `lopt_kernels.launching.parameters` names.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import partial
from math import exp
from typing import Any

import torch
from torch import Tensor

from lopt_kernels.elementwise import lstm
from lopt_kernels.elementwise.lstm import LSTMWeights, State
from lopt_kernels.launching import parameters
from lopt_kernels.launching.op import CompileSource, Op
from lopt_kernels.launching.parameters import Items, Terms
from lopt_kernels.launching.segments import Segments

try:
    import triton
    import triton.language as tl

    from lopt_kernels.elementwise.lstm import count_tiles, run_layers
    from lopt_kernels.launching.parameters import load_gradient, load_terms, store_parameter
    from lopt_kernels.launching.segments import find_row, load_item, load_pointer, load_size, load_slot
except ImportError:  # the reference needs torch only
    triton = None

NUM_FEATURES = 2
LOG_BOUND = 5.0  # k of the preprocessing
OUTPUT_SCALE = 0.01
EPS = torch.finfo(torch.float32).eps  # under the logarithm
BLOCK = lstm.BLOCK


def reference(
    p: Tensor,
    g: Tensor,
    state: State,
    weights: LSTMWeights,
    terms: Terms,
    step: Tensor,
    seeds: Tensor | None = None,
    sanitize: bool = False,
    output_scale: float = OUTPUT_SCALE,
    log_bound: float = LOG_BOUND,
) -> tuple[Tensor, State]:
    """One step of one flat parameter; pure.

    Args:
        p: float32, bfloat16 or float16 `[N]`.
        g: `[N]`, in the dtype of p or float32.
        state: (h1, c1, h2, c2), `[H, N]` each, all float32 or all bfloat16.
        weights: float32, F = 2.
        terms: float32 `[1]` each.
        step: not used; every rule has it.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random.
        sanitize: entries of g that are not finite count as 0.
        output_scale: factor on the output.
        log_bound: k; gradients below e^-k are passed on linearly.
    Returns:
        The new p and state, each rounded once.
    """
    g = parameters.read_gradient(g, terms, sanitize)
    magnitude = ((g.abs() + EPS).log() / log_bound).clamp(min=-1)
    sign = (g * exp(log_bound)).clamp(-1, 1)
    out, state = lstm.reference(torch.stack([magnitude, sign]), state, weights)
    return parameters.move_parameter(p, output_scale * out, terms, seeds), state


if triton is not None:
    _EPS = tl.constexpr(EPS)

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _coordinatewise_lstm_kernel(
        table,  # int64 [n, COLUMNS]: p, h1, c1, h2, c2, N, item, slot
        starts,  # int64 [n + 1]
        num_segments,  # n
        w_ih1,  # [K, ...], as the other meta-weights
        w_hh1,
        b1,
        w_ih2,
        w_hh2,
        b2,
        w_out,
        b_out,
        grads,  # [n], as all numbers of parameters
        lr_ptr,
        decay_ptr,
        grad_scale_ptr,
        live_ptr,
        steps_ptr,
        seeds,  # or None
        output_scale,
        log_bound,  # k
        inverse_bound,  # e^k
        P_TYPE: tl.constexpr,
        G_TYPE: tl.constexpr,
        G_ALIGN: tl.constexpr,
        S_TYPE: tl.constexpr,
        COLUMNS: tl.constexpr,
        ALIGN: tl.constexpr,
        MULTIPLE: tl.constexpr,
        F: tl.constexpr,
        H: tl.constexpr,
        PF: tl.constexpr,
        PH: tl.constexpr,
        BLOCK: tl.constexpr,  # columns at once
        TILES: tl.constexpr,  # of a program
        PRECISION: tl.constexpr,
        FAST: tl.constexpr,
        SANITIZE: tl.constexpr,
    ):
        _, row, block = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
        item = load_item(row, COLUMNS)
        if tl.load(live_ptr + item):
            p = load_pointer(row, 0, P_TYPE, ALIGN)
            g_ptr = load_pointer(grads + item, 0, G_TYPE, G_ALIGN)
            h1 = load_pointer(row, 1, S_TYPE, ALIGN)
            c1 = load_pointer(row, 2, S_TYPE, ALIGN)
            h2 = load_pointer(row, 3, S_TYPE, ALIGN)
            c2 = load_pointer(row, 4, S_TYPE, ALIGN)
            state = (h1, c1, h2, c2)
            size = load_size(row, 5, MULTIPLE)
            index = load_slot(row, COLUMNS)
            w_ih1 += index * (4 * H * F)
            w_hh1 += index * (4 * H * H)
            b1 += index * (4 * H)
            w_ih2 += index * (4 * H * H)
            w_hh2 += index * (4 * H * H)
            b2 += index * (4 * H)
            weights = (w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out + index * H, b_out + index)
            lr, decay, grad_scale = load_terms(item, lr_ptr, decay_ptr, grad_scale_ptr)
            tiles = count_tiles(size, block, BLOCK, TILES)
            for tile in tl.range(tiles, num_stages=1, disable_licm=True):  # weights stay in the cache, not in registers
                column = (block * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
                in_column = column < size
                g = load_gradient(g_ptr, column, in_column, grad_scale, SANITIZE)
                magnitude = tl.log(tl.abs(g) + _EPS) / log_bound
                magnitude = tl.where(magnitude < -1, -1.0, magnitude)  # unlike tl.maximum keeps NaN
                sign = g * inverse_bound
                sign = tl.where(sign < -1, -1.0, tl.where(sign > 1, 1.0, sign))
                feature = tl.arange(0, PF)[:, None]
                x = tl.where(feature == 0, magnitude, tl.where(feature == 1, sign, 0.0))
                out = run_layers(x, state, state, column, in_column, size, weights, F, H, PH, PRECISION, FAST)
                base = tl.load(p + column, in_column, 0.0).to(tl.float32)
                store_parameter(p, column, in_column, base, output_scale * out, lr, decay, seeds, item)


def launch_segments(
    segments: Segments,
    weights: LSTMWeights,
    items: Items,
    sanitize: bool = False,
    precision: str = "ieee",
    output_scale: float = OUTPUT_SCALE,
    log_bound: float = LOG_BOUND,
) -> None:
    """`reference` for all segments in one Triton launch, in place.

    All is float32, with one rounding at the store, but for what `precision` says.

    Args:
        segments: of (p, h1, c1, h2, c2) and sizes (N,), cut by `by_elements(BLOCK)`. p float32, bfloat16 or float16;
            state all float32 or all bfloat16; gradients of p's dtype or float32.
        weights: float32 `[K, ...]` each.
        items: of the parameters; the caller counts steps.
        sanitize: entries of the gradients that are not finite count as 0.
        precision: "ieee" or "tf32", see `lstm.constexprs`.
        output_scale, log_bound: see `reference`.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    parameters.check_dtypes("coordinatewise_lstm", segments, lstm.STATE_DTYPES, num_states=4)
    lstm.check_stacks("coordinatewise_lstm", weights, NUM_FEATURES)
    parameters.check_launch("coordinatewise_lstm", segments, weights._asdict(), items)
    constants = _constexprs(weights.w_hh1.shape[-1], segments.dtypes[1], precision)
    constants |= {"SANITIZE": sanitize, **lstm.OPTIONS}
    numbers = (output_scale, log_bound, exp(log_bound))
    parameters.run(_coordinatewise_lstm_kernel, segments, weights, items, numbers, constants)


launch = partial(parameters.launch_flat, launch_segments, BLOCK)


def _constexprs(hidden: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Compile-time constants for a state of `dtype`."""
    constants = lstm.constexprs(NUM_FEATURES, hidden, dtype, precision)
    return constants | {"TILES": BLOCK // constants["BLOCK"]}


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device, hidden: int = 20
) -> dict[str, object]:
    """Arguments of `reference` and `launch` in the middle of a run; coordinates differ in scale by orders.

    Args:
        num_coordinates: N, may be 0.
        generator: numbers are drawn on its device.
        dtype: of the state; parameter, gradient and weights are float32.
        device: where the tensors go.
        hidden: H.
    """
    p, g = lstm.draw_scaled(2, num_coordinates, generator).to(device)
    return {
        "p": p,
        "g": g,
        "state": lstm.draw_state(num_coordinates, hidden, generator, dtype, device),
        "weights": lstm.draw_weights(NUM_FEATURES, hidden, generator, device),
        "terms": parameters.sample_terms(device),
        "step": torch.tensor([6.0], device=device),
    }


def bytes_moved(
    num_coordinates: int, state_bytes: int = 4, param_bytes: int = 4, grad_bytes: int = 4, hidden: int = 20
) -> int:
    """Bytes one step has to move: p and the state twice, g, the weights and a segment's four numbers.

    `state_bytes`, `param_bytes` and `grad_bytes` are the sizes of one number.
    """
    per_coordinate = 2 * param_bytes + grad_bytes + 2 * 4 * hidden * state_bytes
    return num_coordinates * per_coordinate + 4 * (lstm.count_weights(NUM_FEATURES, hidden) + 4)


def compile_source(
    dtype: torch.dtype,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    seeded: bool = False,
    hidden: int = 20,
    precision: str = "ieee",
) -> CompileSource:
    """The kernel specialised to a state of `dtype`; `seeded`: with stochastic rounding."""
    dtypes, constants = (p_dtype, g_dtype, dtype), _constexprs(hidden, dtype, precision)
    return parameters.compile_source(_coordinatewise_lstm_kernel, dtypes, 8, seeded, constants, lstm.OPTIONS)


OP = Op(
    name="coordinatewise_lstm",
    reference=reference,
    launch=launch,
    launch_segments=launch_segments,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=lstm.STATE_DTYPES,
    block=BLOCK,
)
