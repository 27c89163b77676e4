"""RNNprop over all segments: moments, Adam-normalised features, dense ELU layer, two LSTM layers, parameter out.

Source: Lv, Jiang & Li 2017, arXiv 1703.03633, section 4. It is lopt's rule "rnnprop" under the terms that
`lopt_kernels.launching.parameters` names.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt_kernels.elementwise import lstm
from lopt_kernels.elementwise.lstm import LSTMWeights
from lopt_kernels.launching import parameters
from lopt_kernels.launching.op import CompileSource, Op
from lopt_kernels.launching.parameters import Items, Terms
from lopt_kernels.launching.segments import Segments

try:
    import triton
    import triton.language as tl

    from lopt_kernels.elementwise.lstm import count_tiles, run_layers, tanh
    from lopt_kernels.launching.parameters import load_gradient, load_terms, power, store_parameter
    from lopt_kernels.launching.segments import find_row, load_item, load_pointer, load_size, load_slot
except ImportError:  # the reference needs torch only
    triton = None

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
BETA1 = BETA2 = 0.95
OUTPUT_SCALE = 0.1
EPS = 1e-8  # beside the root
TINY = 1e-30  # under the root, as in lopt's rule
BLOCK = lstm.BLOCK


class RNNpropWeights(NamedTuple):
    """Meta-weights; for `launch_segments` with a leading dimension K. The dense layer makes the H features."""

    w_in: Tensor  # [H, 2]
    b_in: Tensor  # [H]
    w_ih1: Tensor  # [4H, H], as in LSTMWeights from here on
    w_hh1: Tensor
    b1: Tensor
    w_ih2: Tensor
    w_hh2: Tensor
    b2: Tensor
    w_out: Tensor
    b_out: Tensor


def reference(
    p: Tensor,
    g: Tensor,
    state: State,
    weights: RNNpropWeights,
    terms: Terms,
    step: Tensor,
    seeds: Tensor | None = None,
    sanitize: bool = False,
    beta1: float = BETA1,
    beta2: float = BETA2,
    output_scale: float = OUTPUT_SCALE,
) -> tuple[Tensor, State]:
    """One step of one flat parameter; pure.

    Args:
        p: float32, bfloat16 or float16 `[N]`.
        g: `[N]`, in the dtype of p or float32.
        state: (h1, c1, h2, c2) `[H, N]` each, first and second moment `[N]`; all float32 or all bfloat16.
        weights: float32.
        terms: float32 `[1]` each.
        step: updates made so far, a number in float32 `[1]`.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random.
        sanitize: entries of g that are not finite count as 0.
        beta1, beta2: decays of the moments.
        output_scale: largest step of a coordinate.
    Returns:
        The new p and state, each rounded once.
    """
    h1, c1, h2, c2, m, v = state
    g = parameters.read_gradient(g, terms, sanitize)
    m = beta1 * m.float() + (1 - beta1) * g
    v = beta2 * v.float() + (1 - beta2) * g * g
    scale = (v / (1 - beta2 ** (step + 1)) + TINY).sqrt() + EPS
    inputs = torch.stack([m / (1 - beta1 ** (step + 1)) / scale, g / scale])
    x = F.elu(weights.w_in @ inputs + weights.b_in[:, None])
    out, vectors = lstm.reference(x, (h1, c1, h2, c2), LSTMWeights(*weights[2:]))
    delta = output_scale * torch.tanh(out)
    return parameters.move_parameter(p, delta, terms, seeds), (*vectors, m.to(h1.dtype), v.to(h1.dtype))


if triton is not None:
    _EPS, _TINY = tl.constexpr(EPS), tl.constexpr(TINY)

    @triton.jit
    def _elu(x):
        near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24))))  # exp(x) - 1 cancels here
        return tl.where(x > 0, x, tl.where(x > -0.05, near, tl.exp(x) - 1))

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _rnnprop_kernel(
        table,  # int64 [n, COLUMNS]: p, h1, c1, h2, c2, m, v, N, item, slot
        starts,  # int64 [n + 1]
        num_segments,  # n
        w_in,  # [K, ...], as the other meta-weights
        b_in,
        w_ih1,
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
        beta1,
        beta2,
        rest1,  # 1 - beta1, computed in float64
        rest2,
        output_scale,
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
            m_ptr = load_pointer(row, 5, S_TYPE, ALIGN)
            v_ptr = load_pointer(row, 6, S_TYPE, ALIGN)
            size = load_size(row, 7, MULTIPLE)
            index = load_slot(row, COLUMNS)
            w_ih1 += index * (4 * H * F)
            w_hh1 += index * (4 * H * H)
            b1 += index * (4 * H)
            w_ih2 += index * (4 * H * H)
            w_hh2 += index * (4 * H * H)
            b2 += index * (4 * H)
            weights = (w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out + index * H, b_out + index)
            feature = tl.arange(0, PF).to(tl.int64)
            in_feature = feature < F
            w_m = tl.load(w_in + index * (2 * F) + 2 * feature, in_feature, 0.0)[:, None]
            w_g = tl.load(w_in + index * (2 * F) + 2 * feature + 1, in_feature, 0.0)[:, None]
            bias = tl.load(b_in + index * F + feature, in_feature, 0.0)[:, None]
            step = tl.load(steps_ptr + item)
            correction1, correction2 = 1 - power(beta1, step + 1), 1 - power(beta2, step + 1)
            lr, decay, grad_scale = load_terms(item, lr_ptr, decay_ptr, grad_scale_ptr)
            tiles = count_tiles(size, block, BLOCK, TILES)
            for tile in tl.range(tiles, num_stages=1, disable_licm=True):  # weights stay in the cache, not in registers
                column = (block * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
                in_column = column < size
                g = load_gradient(g_ptr, column, in_column, grad_scale, SANITIZE)
                m = beta1 * tl.load(m_ptr + column, in_column, 0.0).to(tl.float32) + rest1 * g
                v = beta2 * tl.load(v_ptr + column, in_column, 0.0).to(tl.float32) + rest2 * g * g
                tl.store(m_ptr + column, m.to(S_TYPE), in_column)
                tl.store(v_ptr + column, v.to(S_TYPE), in_column)
                scale = tl.sqrt(v / correction2 + _TINY) + _EPS
                x = _elu(w_m * (m / correction1 / scale) + w_g * (g / scale) + bias)
                x = tl.where(in_feature[:, None], x, 0.0)  # 0 * inf made NaN of padded rows
                out = run_layers(x, state, state, column, in_column, size, weights, F, H, PH, PRECISION, FAST)
                base = tl.load(p + column, in_column, 0.0).to(tl.float32)
                store_parameter(p, column, in_column, base, output_scale * tanh(out), lr, decay, seeds, item)


def launch_segments(
    segments: Segments,
    weights: RNNpropWeights,
    items: Items,
    sanitize: bool = False,
    precision: str = "ieee",
    beta1: float = BETA1,
    beta2: float = BETA2,
    output_scale: float = OUTPUT_SCALE,
) -> None:
    """`reference` for all segments in one Triton launch, in place.

    All is float32, with one rounding at the store, but for what `precision` says.

    Args:
        segments: of (p, h1, c1, h2, c2, m, v) and sizes (N,), cut by `by_elements(BLOCK)`. p float32, bfloat16 or
            float16; state all float32 or all bfloat16; gradients of p's dtype or float32.
        weights: float32 `[K, ...]` each.
        items: of the parameters; the caller counts steps.
        sanitize: entries of the gradients that are not finite count as 0.
        precision: "ieee" or "tf32", see `lstm.constexprs`.
        beta1, beta2, output_scale: see `reference`.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    parameters.check_dtypes("rnnprop", segments, lstm.STATE_DTYPES, num_states=6)
    hidden = weights.b_in.shape[-1]
    lstm.check_stacks("rnnprop", LSTMWeights(*weights[2:]), num_features=hidden)
    if weights.w_in.shape != (len(weights.w_hh1), hidden, 2) or weights.b_in.shape != (len(weights.w_hh1), hidden):
        raise ValueError(
            f"rnnprop kernel: w_in and b_in must have shapes [K, H, 2] and [K, H], got {list(weights.w_in.shape)} and "
            f"{list(weights.b_in.shape)} for {len(weights.w_hh1)} LSTMs."
        )
    parameters.check_launch("rnnprop", segments, weights._asdict(), items)
    constants = _constexprs(hidden, segments.dtypes[1], precision) | {"SANITIZE": sanitize, **lstm.OPTIONS}
    numbers = (beta1, beta2, 1 - beta1, 1 - beta2, output_scale)
    parameters.run(_rnnprop_kernel, segments, weights, items, numbers, constants)


launch = partial(parameters.launch_flat, launch_segments, BLOCK)


def _constexprs(hidden: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Compile-time constants for a state of `dtype`."""
    constants = lstm.constexprs(hidden, hidden, dtype, precision)
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
    p, g, m, spread = lstm.draw_scaled(4, num_coordinates, generator)
    v = spread.square() + m.square()
    w_in = torch.randn(hidden, 2, generator=generator, device=generator.device)
    b_in = torch.randn(hidden, generator=generator, device=generator.device)
    layers = lstm.draw_weights(hidden, hidden, generator, device)
    return {
        "p": p.to(device),
        "g": g.to(device),
        "state": (
            *lstm.draw_state(num_coordinates, hidden, generator, dtype, device),
            *(x.to(device, dtype) for x in (m, v)),
        ),
        "weights": RNNpropWeights(w_in.to(device), b_in.to(device), *layers),
        "terms": parameters.sample_terms(device),
        "step": torch.tensor([6.0], device=device),
    }


def bytes_moved(
    num_coordinates: int, state_bytes: int = 4, param_bytes: int = 4, grad_bytes: int = 4, hidden: int = 20
) -> int:
    """Bytes one step has to move: p and the state twice, g, the weights and a segment's four numbers.

    `state_bytes`, `param_bytes` and `grad_bytes` are the sizes of one number.
    """
    per_coordinate = 2 * param_bytes + grad_bytes + 2 * (4 * hidden + 2) * state_bytes
    return num_coordinates * per_coordinate + 4 * (3 * hidden + lstm.count_weights(hidden, hidden) + 4)


def compile_source(
    dtype: torch.dtype,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    seeded: bool = False,
    hidden: int = 20,
    precision: str = "ieee",
) -> CompileSource:
    """The kernel specialised to a state of `dtype`; `seeded`: with stochastic rounding."""
    constants = _constexprs(hidden, dtype, precision)
    return parameters.compile_source(_rnnprop_kernel, (p_dtype, g_dtype, dtype), 10, seeded, constants, lstm.OPTIONS)


OP = Op(
    name="rnnprop",
    reference=reference,
    launch=launch,
    launch_segments=launch_segments,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=lstm.STATE_DTYPES,
    block=BLOCK,
)
