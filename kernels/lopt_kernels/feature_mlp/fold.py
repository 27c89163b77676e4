"""From the sums of one pass over the elements to the network of the next: one small program per segment.

Source: Metz et al. 2022, arXiv 2203.11860. Features are normalised by their mean squares over a segment: that scales
the columns of its first layer. The time features are the same for all elements: they go into its bias.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.elementwise.lstm_layers import tanh
from lopt_kernels.feature_mlp import accumulate, samples
from lopt_kernels.feature_mlp.features import LINE_FEATURES, Family
from lopt_kernels.feature_mlp.mlp import MLPWeights
from lopt_kernels.feature_mlp.table import COLUMNS, ELEMENTS, KIND_OF, ROWS, VECTOR, Tensors, make_segments
from lopt_kernels.feature_mlp.tiling import BLOCK, Shape
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import constant, jit, table_kernel, tl, triton
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import Segments, load_index, load_slot

DEPTH = 64  # rows of the buffer of sums, at once
STATE_DTYPES = (torch.float32,)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
RMS_EPS = 1e-9  # added to the mean of p^2


class Network(NamedTuple):
    """What becomes of the sums beside the features' family and the MLP's shape.

    Attributes:
        time_scales: of the constant features, float32 `[C]`; `tanh(t / scale - 1)` after t updates.
        norm_eps: added to mean squares before their roots are inverted.
        step_mult: factor on the step.
        relative: the step is relative to the parameter's rms.
    """

    time_scales: Tensor
    norm_eps: float = 1e-5
    step_mult: float = 1e-3
    relative: bool = False


def pack(first: Tensor, bias: Tensor, constant: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """Meta-weights of K networks as `[K, T]`, one behind the other.

    Args:
        first: first layer `[K, H, I]` on element features, features of rows, features of columns.
        bias: `[K, H]`.
        constant: first layer on the constant features `[K, H, C]`.
        rest: weights `[K, out, in]` and biases `[K, out]` of the further layers.
    """
    return torch.cat([x.flatten(1) for x in (first, bias, constant, *rest)], 1)


def count_first(family: Family, shape: Shape, network: Network) -> int:
    """Numbers of a packed row before the further layers: first layer, its bias, and its weights on constant features.

    By it a row `[T]` of `pack` is taken apart.
    """
    return shape.hidden * (family.num_inputs + 1 + len(network.time_scales))


def reference(
    sums: Tensor,
    t: Tensors,
    weights: Tensor,
    step: Tensor,
    factor: Tensor,
    family: Family,
    shape: Shape,
    network: Network,
) -> MLPWeights:
    """One parameter's part of the launch; pure.

    Args:
        sums: of squares, `[groups, I]`.
        t: its kind and counts are used.
        weights: one packed row `[T]`.
        step: updates made so far, `[1]`.
        factor: on the step, `[1]`.
    Returns:
        n = groups.
    """
    h, inputs = shape.hidden, family.num_inputs
    first, bias, constant, rest = weights.split([h * inputs, h, h * len(network.time_scales), shape.num_rest])
    first = first.view(h, inputs)
    if t.rows == 1:
        elements, rows, columns = first.split([family.num_features, LINE_FEATURES, LINE_FEATURES], 1)
        first = torch.cat([elements, columns, rows], 1)
    if family.factored and t.axes is None:
        first = torch.cat([first[:, : family.vector_inputs], torch.zeros_like(first[:, family.vector_inputs :])], 1)
    square = sums / max(1, t.group_size)
    scale = (square + network.norm_eps).rsqrt()
    bias = bias + constant.view(h, -1) @ torch.tanh(step / network.time_scales - 1)
    gain = network.step_mult * factor.expand(t.groups)
    if network.relative:
        gain = gain * (square[:, family.p_index] + RMS_EPS).sqrt()
    return MLPWeights(first * scale[:, None], bias.expand(t.groups, -1), rest[None], gain)


VECTOR_ = constant(VECTOR)
LINE_FEATURES_ = constant(LINE_FEATURES)
RMS_EPS_ = constant(RMS_EPS)


@jit
def _add_partials(partial_ptr, begin, end, INPUTS: tl.constexpr, IP: tl.constexpr, DEPTH: tl.constexpr):
    """The sums `[IP]` of a segment's blocks, `DEPTH` blocks at a time."""
    k = tl.arange(0, IP)
    total = tl.zeros([DEPTH, IP], tl.float32)
    for start in range(begin, end, DEPTH):
        block = start + tl.arange(0, DEPTH).to(tl.int64)
        mask = (block < end)[:, None] & (k < INPUTS)
        total += tl.load(partial_ptr + (block * INPUTS)[:, None] + k, mask, 0.0)
    return tl.sum(total, axis=0)


@table_kernel
def _fold_kernel(
    table,  # int64 [n, COLUMNS]: see table.make_segments
    starts,  # int64 [n + 1]
    partial_ptr,  # [blocks, INPUTS]
    weights_ptr,  # [K, TOTAL]
    time_scales_ptr,  # [C]
    steps_ptr,  # [items], as the next one
    factor_ptr,  # or None: 1
    first_ptr,  # [n, H, INPUTS]
    bias_ptr,  # [n, H]
    gain_ptr,  # [n]
    norm_eps,
    step_mult,
    TOTAL: tl.constexpr,
    F: tl.constexpr,
    INPUTS: tl.constexpr,
    VECTOR_INPUTS: tl.constexpr,
    P_INDEX: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    RELATIVE: tl.constexpr,
    IP: tl.constexpr,  # INPUTS, H and C to powers of two
    HP: tl.constexpr,
    CP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    row = table + segment * COLUMNS
    index, kind = load_index(row, COLUMNS), tl.load(row + KIND_OF)
    weights = weights_ptr + load_slot(row, COLUMNS) * TOTAL
    k, j = tl.arange(0, IP), tl.arange(0, HP).to(tl.int64)
    total = _add_partials(partial_ptr, tl.load(starts + segment), tl.load(starts + segment + 1), INPUTS, IP, DEPTH)
    square = total / tl.maximum(tl.load(row + ELEMENTS), 1).to(tl.float32)
    known = INPUTS
    source = k
    if INPUTS > F:
        if kind == VECTOR_:
            known = VECTOR_INPUTS
        swapped = (tl.load(row + ROWS) == 1) & (k >= F)
        source = tl.where(swapped, F + (k - F + LINE_FEATURES_) % (2 * LINE_FEATURES_), k)
    mask = (j < H)[:, None] & (k < INPUTS)
    w = tl.load(weights + (j * INPUTS)[:, None] + source, mask, 0.0) * tl.rsqrt(square + norm_eps)[None, :]
    w = tl.where((k < known)[None, :], w, 0.0)
    tl.store(first_ptr + segment * (H * INPUTS) + (j * INPUTS)[:, None] + k, w, mask)
    bias = tl.load(weights + H * INPUTS + j, j < H, 0.0)
    if C > 0:
        c = tl.arange(0, CP)
        time = tl.load(steps_ptr + index).to(tl.float32) / tl.load(time_scales_ptr + c, c < C, 1.0)
        w = tl.load(weights + H * (INPUTS + 1) + (j * C)[:, None] + c, (j < H)[:, None] & (c < C), 0.0)
        bias += tl.sum(w * tanh(time - 1)[None, :], axis=1)
    tl.store(bias_ptr + segment * H + j, bias, j < H)
    gain = step_mult
    if factor_ptr is not None:
        gain = gain * tl.load(factor_ptr + index)
    if RELATIVE:
        gain = gain * tl.sqrt(tl.sum(tl.where(k == P_INDEX, square, 0.0)) + RMS_EPS_)
    tl.store(gain_ptr + segment, gain)


def launch_segments(
    segments: Segments,
    partial: Tensor,
    weights: Tensor,
    items: Items,
    family: Family,
    shape: Shape,
    network: Network,
    factor: Tensor | None = None,
) -> MLPWeights:
    """`reference` for all segments in one launch.

    Args:
        segments: of `accumulate.launch_segments`, which has made `partial`.
        weights: float32 `[K, T]` of `pack`, rows for the segments' slots.
        items: their steps are used.
        factor: float32 `[items]`; None: 1.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    total, n = count_first(family, shape, network) + shape.num_rest, segments.num_segments
    if weights.ndim != 2 or weights.shape[1] != total:
        raise ValueError(f"fold kernel: weights must have shape [K, {total}], got {list(weights.shape)}.")
    parameters.check_launch("fold", segments, {"weights": weights}, items)
    first = weights.new_empty(n, shape.hidden, family.num_inputs)
    bias, gain = weights.new_empty(n, shape.hidden), weights.new_empty(n)
    with torch.cuda.device_of(weights):
        _fold_kernel[(n,)](
            *(segments.table, segments.starts, partial, weights, network.time_scales, items.steps, factor),
            *(first, bias, gain, network.norm_eps, network.step_mult),
            **_constexprs(family, shape, network),
            **OPTIONS,
        )
    return MLPWeights(first, bias, weights[:, total - shape.num_rest :], gain)


def _constexprs(family: Family, shape: Shape, network: Network) -> dict[str, int | bool]:
    """The kernel's compile-time constants."""
    constants = len(network.time_scales)
    padded = {"IP": family.num_inputs, "HP": shape.hidden, "CP": max(1, constants)}
    return {
        "F": family.num_features,
        "INPUTS": family.num_inputs,
        "VECTOR_INPUTS": family.vector_inputs,
        "P_INDEX": family.p_index,
        "H": shape.hidden,
        "C": constants,
        "TOTAL": count_first(family, shape, network) + shape.num_rest,
        "RELATIVE": network.relative,
        **{key: triton.next_power_of_2(size) for key, size in padded.items()},
        "DEPTH": DEPTH,
    }


def launch(
    group: Sequence[Tensors],
    sums: Sequence[Tensor],
    weights: Tensor,
    steps: Tensor,
    factor: Tensor,
    family: Family,
    shape: Shape,
    network: Network,
) -> list[MLPWeights]:
    """`reference` of every parameter of a group in one Triton launch; for tests and benchmarks.

    Args:
        group: of them kinds, counts and addresses are used.
        sums: of squares, `[groups, I]` for each parameter.
        weights: one packed row for all, `[1, T]`.
        steps: int64, one number for each parameter, as is `factor` in float32.
    """
    parts = [part for i, t in enumerate(group) for part in make_segments(t, i, 1)]
    segments = Segments(parts, lambda sizes: 1)
    rates = parameters.Rates(*[torch.ones_like(factor)] * 3)
    items = parameters.make_items([t.g for t in group], rates, steps=steps)
    made = launch_segments(segments, torch.cat(list(sums)).contiguous(), weights, items, family, shape, network, factor)
    counts = [t.groups for t in group]
    rows = zip(*(x.split(counts) for x in (made.first, made.bias, made.gain)), strict=True)
    return [MLPWeights(first, bias, made.rest, gain) for first, bias, gain in rows]


def sample(
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    family: Family | None = None,
    shape: Shape | None = None,
) -> dict[str, object]:
    """Arguments of `launch`: a matrix and a vector which have so many elements together, and the sums that they have.

    Args:
        generator: numbers are drawn on its device.
        dtype: of parameters and gradients.
        shape: of the MLP; 32 hidden units by default.
    """
    family, shape = family or Family(), shape or Shape(hidden=32)
    group = samples.draw_group(samples.divide_coordinates(num_coordinates), family, generator, dtype, device)
    network = Network(torch.tensor([1.0, 10.0, 100.0], device=device, dtype=torch.float32), relative=True)
    total = count_first(family, shape, network) + shape.num_rest
    drawn = accumulate.reference
    rates, decays = parameters.sample_rates(device), samples.draw_decays(family, device)
    return {
        "group": group,
        "sums": [drawn(t, decays, rates, family).squares for t in group],
        "weights": torch.randn(1, total, generator=generator, device=generator.device, dtype=torch.float32).to(device),
        "steps": torch.arange(len(group), device=device) * 7,
        "factor": torch.linspace(0.5, 2.0, len(group), device=device, dtype=torch.float32),
        "family": family,
        "shape": shape,
        "network": network,
    }


def bytes_moved(num_segments: int, family: Family | None = None, shape: Shape | None = None) -> int:
    """Bytes one launch has to write: the first layer of every segment, its bias and gain.

    What it reads, sums and meta-weights, comes from the cache.
    """
    family, shape = family or Family(), shape or Shape(hidden=32)
    return 4 * num_segments * (shape.hidden * (family.num_inputs + 1) + 1)


def compile_source(dtype: torch.dtype, family: Family | None = None, shape: Shape | None = None) -> CompileSource:
    """The kernel specialised to a family and an MLP with eleven constant features; 32 hidden units by default.

    It can be compiled and inspected where no GPU is.

    Args:
        dtype: of the accumulators, which is float32.
    """
    constexprs = _constexprs(
        family or Family(), shape or Shape(hidden=32), Network(torch.ones(11, dtype=torch.float32))
    )
    types = parameters.TYPES | {"norm_eps": "fp32", "step_mult": "fp32"}
    return specialize(_fold_kernel, constexprs, OPTIONS, **types)


OP = make_op(__name__, block=BLOCK)
