"""AdamW over all segments: parameter and both moments in one pass.

Source: Loshchilov & Hutter 2019, arXiv 1711.05101; equal to torch.optim.AdamW. It is lopt's rule "adamw" (whose own
learning rate and decay are meta-weights) under the terms that `lopt_kernels.launching.parameters` names. A schedule of
the rule's learning rate is the caller's: a stack of meta-weights whose `lr` is scaled.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching import parameters
from lopt_kernels.launching.op import CompileSource, Op
from lopt_kernels.launching.parameters import Items, Terms
from lopt_kernels.launching.segments import Segments

try:
    import triton
    import triton.language as tl

    from lopt_kernels.launching.parameters import load_gradient, load_terms, power, store_parameter
    from lopt_kernels.launching.segments import find_row, load_item, load_pointer, load_size, load_slot
except ImportError:  # the reference needs torch only
    triton = None

Moments = tuple[Tensor, Tensor]
MOMENT_DTYPES = (torch.float32,)
BLOCK = 1024  # coordinates per program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
TINY = 1e-30  # under the root, as in lopt's rule


class AdamWWeights(NamedTuple):
    """Meta-weights, `[]` each; for `launch_segments` `[K]`."""

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor


def reference(
    p: Tensor,
    g: Tensor,
    state: Moments,
    weights: AdamWWeights,
    terms: Terms,
    step: Tensor,
    seeds: Tensor | None = None,
    sanitize: bool = False,
) -> tuple[Tensor, Moments]:
    """One step of one flat parameter; pure.

    Args:
        p: float32, bfloat16 or float16 `[N]`.
        g: `[N]`, in the dtype of p or float32.
        state: first and second moment, float32 `[N]`.
        weights: float32.
        terms: float32 `[1]` each.
        step: updates made so far, a number in float32 `[1]`.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random.
        sanitize: entries of g that are not finite count as 0.
    Returns:
        The new p and moments.
    """
    g = parameters.read_gradient(g, terms, sanitize)
    m = torch.lerp(g, state[0], weights.beta1)
    v = weights.beta2 * state[1] + (1 - weights.beta2) * g * g
    m_hat = m / (1 - weights.beta1 ** (step + 1))
    scale = (v / (1 - weights.beta2 ** (step + 1)) + TINY).sqrt() + weights.eps
    delta = -weights.lr * (m_hat / scale + weights.weight_decay * p.float())
    return parameters.move_parameter(p, delta, terms, seeds), (m, v)


if triton is not None:

    @triton.jit
    def _update(
        p_ptr, g_ptr, m_ptr, v_ptr, at, mask, weights, corrections, terms, seeds, item, SANITIZE: tl.constexpr
    ):  # at, mask [BLOCK]
        rule_lr, weight_decay, beta1, beta2, eps = weights
        correction1, correction2 = corrections
        lr, decay, grad_scale = terms
        g = load_gradient(g_ptr, at, mask, grad_scale, SANITIZE)
        p = tl.load(p_ptr + at, mask, 0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask, 0.0)
        v = tl.load(v_ptr + at, mask, 0.0)
        m = tl.where(beta1 < 0.5, g + beta1 * (m - g), m - (m - g) * (1 - beta1))  # torch.lerp
        v = beta2 * v + (1 - beta2) * g * g
        scale = tl.sqrt(v / correction2 + TINY_) + eps
        delta = -rule_lr * (m / correction1 / scale + weight_decay * p)
        tl.store(m_ptr + at, m, mask)
        tl.store(v_ptr + at, v, mask)
        store_parameter(p_ptr, at, mask, p, delta, lr, decay, seeds, item)

    TINY_ = tl.constexpr(TINY)

    @triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=["table", "starts"])
    def _adamw_kernel(
        table,  # int64 [n, COLUMNS]: p, m, v, N, item, slot
        starts,  # int64 [n + 1]
        num_segments,  # n
        rule_lr_ptr,  # [K], as the other meta-weights
        weight_decay_ptr,
        beta1_ptr,
        beta2_ptr,
        eps_ptr,
        grads,  # [n], as all that follow
        lr_ptr,
        decay_ptr,
        grad_scale_ptr,
        live_ptr,
        steps_ptr,
        seeds,  # or None
        P_TYPE: tl.constexpr,
        G_TYPE: tl.constexpr,
        G_ALIGN: tl.constexpr,
        S_TYPE: tl.constexpr,
        COLUMNS: tl.constexpr,
        ALIGN: tl.constexpr,
        MULTIPLE: tl.constexpr,
        BLOCK: tl.constexpr,
        SANITIZE: tl.constexpr,
    ):
        _, row, block = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
        item = load_item(row, COLUMNS)
        if tl.load(live_ptr + item):
            p = load_pointer(row, 0, P_TYPE, ALIGN)
            g = load_pointer(grads + item, 0, G_TYPE, G_ALIGN)
            m = load_pointer(row, 1, S_TYPE, ALIGN)
            v = load_pointer(row, 2, S_TYPE, ALIGN)
            size = load_size(row, 3, MULTIPLE)
            index = load_slot(row, COLUMNS)
            beta1, beta2 = tl.load(beta1_ptr + index), tl.load(beta2_ptr + index)
            weights = (
                tl.load(rule_lr_ptr + index), tl.load(weight_decay_ptr + index), beta1, beta2, tl.load(eps_ptr + index)
            )  # fmt: skip
            step = tl.load(steps_ptr + item)
            corrections = (1 - power(beta1, step + 1), 1 - power(beta2, step + 1))
            terms = load_terms(item, lr_ptr, decay_ptr, grad_scale_ptr)
            at = block * BLOCK + tl.arange(0, BLOCK)
            if (block + 1) * BLOCK <= size:  # no mask: wide loads whatever the size
                everywhere = tl.full((BLOCK,), True, tl.int1)
                _update(p, g, m, v, at, everywhere, weights, corrections, terms, seeds, item, SANITIZE)
            else:
                _update(p, g, m, v, at, at < size, weights, corrections, terms, seeds, item, SANITIZE)


def launch_segments(
    segments: Segments,
    weights: AdamWWeights,
    items: Items,
    sanitize: bool = False,
) -> None:
    """`reference` for all segments in one Triton launch, in place; float32 arithmetic, one rounding at the store.

    Args:
        segments: of (p, m, v) and sizes (N,), cut by `by_elements(BLOCK)`. p float32, bfloat16 or float16; moments
            float32; gradients of the same dtype or float32.
        weights: float32 `[K]` each.
        items: of the parameters; the caller counts steps.
        sanitize: entries of the gradients that are not finite count as 0.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    parameters.check_dtypes("adamw", segments, MOMENT_DTYPES, num_states=2)
    parameters.check_launch("adamw", segments, weights._asdict(), items)
    constants = {"SANITIZE": sanitize, "BLOCK": BLOCK, **OPTIONS}
    parameters.run(_adamw_kernel, segments, weights, items, (), constants)


launch = partial(parameters.launch_flat, launch_segments, BLOCK)


def sample(
    num_coordinates: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Arguments of `reference` and `launch` in the middle of a run; coordinates differ in scale by orders.

    Args:
        num_coordinates: N, may be 0.
        generator: numbers are drawn on its device.
        dtype: of the moments; parameter, gradient and weights are float32.
        device: where the tensors go.
    """

    def draw() -> Tensor:
        return torch.randn(num_coordinates, generator=generator, device=generator.device)

    scale = 10 ** (2 * draw() - 2)
    p, g, m = draw(), draw() * scale, draw() * scale
    v = (draw() * scale).square() + m * m
    numbers = (3e-3, 1e-2, 0.9, 0.999, 1e-8)
    return {
        "p": p.to(device),
        "g": g.to(device),
        "state": (m.to(device, dtype), v.to(device, dtype)),
        "weights": AdamWWeights(*(torch.tensor([x], device=device) for x in numbers)),
        "terms": parameters.sample_terms(device),
        "step": torch.tensor([6.0], device=device),
    }


def bytes_moved(num_coordinates: int, state_bytes: int = 4, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one step has to move: p and both moments twice, g, and a segment's nine numbers.

    `state_bytes`, `param_bytes` and `grad_bytes` are the sizes of one number.
    """
    return num_coordinates * (2 * param_bytes + grad_bytes + 4 * state_bytes) + 4 * 9


def compile_source(
    dtype: torch.dtype, p_dtype: torch.dtype = torch.float32, g_dtype: torch.dtype = torch.float32, seeded: bool = False
) -> CompileSource:
    """The kernel specialised to moments of `dtype`; `seeded`: with stochastic rounding."""
    return parameters.compile_source(_adamw_kernel, (p_dtype, g_dtype, dtype), 6, seeded, {"BLOCK": BLOCK}, OPTIONS)


OP = Op(
    name="adamw",
    reference=reference,
    launch=launch,
    launch_segments=launch_segments,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_source=compile_source,
    state_dtypes=MOMENT_DTYPES,
    block=BLOCK,
)
