"""The MLP of one element from its features to its step, and the write of the parameter.

Source: Metz et al. 2022, arXiv 2203.11860. The normalisation of the features is folded into the first layer's weights
and all that is the same for a whole tensor into its bias (`lopt.rules.building_blocks.feature_mlp`), so that each
segment has a first layer of its own. In a matrix what a column contributes is kept while a program walks down the
rows, and what a row contributes is computed once for all its columns.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: SIM102, SIM109 (Triton concatenates tuples, and tests constants apart from values)

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate as accumulate_sizes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.feature_mlp import features
from lopt_kernels.feature_mlp.features import (
    FIRST,
    FIRST_SCALE,
    LINE_FEATURES,
    SECOND,
    SECOND_SCALE,
    STRIDED,
    VECTOR,
    WIDE,
    Family,
    M,
    P,
    Tensors,
    V,
    clip,
    find_aligns,
    find_elements,
    find_lengths,
    find_tile,
    load_several,
    make_factors,
    make_features,
    make_line_features,
)
from lopt_kernels.feature_mlp.layers import (
    dot,
    finish_dot,
    finish_plain,
    load_column,
    load_numbers,
    load_rest,
    load_tile,
    multiply,
    stack,
)
from lopt_kernels.launching import parameters, tuning
from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, table_kernel, tl, triton
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, load_gradient, load_rates, store_parameter
from lopt_kernels.launching.segments import (
    ALIGNMENT,
    Segments,
    find_row,
    load_index,
    load_pointer,
    load_size,
    load_slot,
)
from lopt_kernels.launching.tuning import Tile

BLOCK, STEPS = 128, 64  # elements that a program takes at once, and how often: one per thread, more of them spill
DOT_BLOCK, DOT_STEPS = 128, 64  # the same where tensor cores multiply
TILE_BLOCK = 64  # the same for tiles in "ieee", which other units multiply: with more, registers spill
WARPS = 4
STATE_DTYPES = (torch.float32,)
OPTIONS = {"enable_fp_fusion": True}
DOT_HIDDEN = 16  # from this width on tensor cores are used
MAX_HIDDEN = 128  # wider tiles do not fit the registers
PRECISIONS = ("ieee", "tf32", "bf16")


class MLPWeights(NamedTuple):
    """The MLPs of n segments for one step, float32.

    Attributes:
        first: first layer `[n, hidden, I]` with the normalisation folded in; inputs: F element features, 6 of the first
            line, 6 of the second, see `Family`; without lines what their weights are does not matter.
        bias: its bias `[n, hidden]`, with constant features folded in.
        rest: weights `[out, in]` and bias of each further layer, one behind the other, `[K, R]` for the slots; rows may
            be apart.
        gain: factor on the step `[n]`.
    """

    first: Tensor
    bias: Tensor
    rest: Tensor
    gain: Tensor


class Shape(NamedTuple):
    """What the kernel is compiled for beside the family: widths, outputs, and `exp_mult` (0: the step is d alone).

    Attributes:
        hidden: width of the hidden layers.
        layers: how many hidden layers, at least 1.
        outputs: 1 (d) or 2 (d, a).
        exp_mult: the step is `-gain d exp(exp_mult a)`.
    """

    hidden: int
    layers: int = 1
    outputs: int = 2
    exp_mult: float = 1e-3

    @property
    def num_rest(self) -> int:
        """R, the numbers of all layers but the first."""
        return (self.layers - 1) * self.hidden * (self.hidden + 1) + self.outputs * (self.hidden + 1)


def reference(
    t: Tensors,
    weights: MLPWeights,
    rates: Rates,
    family: Family,
    shape: Shape,
    sanitize: bool = False,
    delta: bool = False,
) -> Tensor:
    """One parameter's part of the launch; pure.

    Args:
        t: with the new accumulators.
        weights: of its segments, n = `t.groups`; `rest` `[1, R]`.
        rates: `[1]` each.
        sanitize: entries of g that are not finite count as 0.
        delta: return the step in float32 `[*shape]` instead.
    Returns:
        The new parameter `[*shape]`.
    """
    x = features.all_features(t, rates, family, sanitize).movedim(1, 0)  # [n, F or I, N]
    h = weights.first[..., : x.shape[1]] @ x + weights.bias[..., None]
    start = 0
    for width in [shape.hidden] * (shape.layers - 1) + [shape.outputs]:
        middle, end = start + width * shape.hidden, start + width * (shape.hidden + 1)
        w, b = weights.rest[:, start:middle], weights.rest[:, middle:end]
        h = w.reshape(-1, width, shape.hidden) @ h.relu() + b[..., None]
        start = end
    step = h[:, 0]
    if shape.exp_mult:
        step = step * torch.exp(shape.exp_mult * h[:, 1])
    step = features.join_groups(step * -weights.gain[:, None], t)
    return step if delta else parameters.move_parameter(t.p, step, rates)


WIDE_, STRIDED_, VECTOR_ = (constant(x) for x in (WIDE, STRIDED, VECTOR))
NUM_KINDS_ = constant(features.NUM_KINDS)
LINE_FEATURES_ = constant(LINE_FEATURES)

# -- one program --


@jit
def _move(
    row, local, index, g_ptr, rates, live, seeds, first_weights, bias, rest, gain, out_ptr,
    P_TYPE: tl.constexpr, ALIGN: tl.constexpr, SIZES: tl.constexpr, KIND: tl.constexpr,
    MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
    VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, INPUTS: tl.constexpr, SANITIZE: tl.constexpr,
    H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, EXP_MULT: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    lr, decay, scale = rates
    p_ptr = load_pointer(row, P, P_TYPE, ALIGN)
    m_ptr, v_ptr = load_pointer(row, M, tl.float32, ALIGN), load_pointer(row, V, tl.float32, ALIGN)
    first_ptr = load_pointer(row, FIRST, tl.float32, ALIGN)
    second_ptr = load_pointer(row, SECOND, tl.float32, ALIGN)
    first_scale_ptr = load_pointer(row, FIRST_SCALE, tl.float32, ALIGN)
    second_scale_ptr = load_pointer(row, SECOND_SCALE, tl.float32, ALIGN)
    numel, first_length, second_length = find_lengths(row, SIZES, KIND, WIDTH)
    start, stop, lane = find_tile(row, local, SIZES, KIND, WIDTH, BLOCK, STEPS)

    # inputs that are an element's own here: all but those of a matrix's lines
    COUNT: tl.constexpr = INPUTS if KIND == STRIDED_ or KIND == VECTOR_ else F
    PADDED: tl.constexpr = 16 if COUNT <= 16 else 32
    if DOT:
        w_first = load_tile(first_weights, H, COUNT, INPUTS, PADDED, HP)
        tiles = load_rest(rest, H, LAYERS, OUTPUTS, HP)
        base = tl.zeros([BLOCK, HP], tl.float32) + load_column(bias, H, 1, HP)[None, :]
    else:
        base = load_numbers(bias, H)
    columns = ()
    if KIND == WIDE_:
        inside = lane < second_length
        columns = load_several(second_scale_ptr, lane, inside, second_length, 3)
        of_columns = make_line_features(load_several(second_ptr, lane, inside, second_length, 3))
        if DOT:
            for k in tl.static_range(LINE_FEATURES_):
                w = load_column(first_weights + F + LINE_FEATURES_ + k, H, INPUTS, HP)
                base += of_columns[k][:, None] * w[None, :]
        else:
            base = multiply(of_columns, base, first_weights + F + LINE_FEATURES_, LINE_FEATURES_, INPUTS, H)

    for step in range(start, stop):
        at, first_at, second_at, mask = find_elements(row, step, lane, live, SIZES, KIND, WIDTH, BLOCK)
        g = clip(load_gradient(g_ptr, at, mask, scale, SANITIZE), BOUND)
        p = tl.load(p_ptr + at, mask, 0.0).to(tl.float32)
        m = load_several(m_ptr, at, mask, numel, MOMENTA)
        v, factor, factor_m, first = g, m, m, m
        if FACTORED:
            v = tl.load(v_ptr + at, mask, 0.0)
            second = columns
            if KIND == VECTOR_:
                first = load_several(first_ptr, at, mask, numel, 3)
                second = first
            elif KIND == STRIDED_:
                first = load_several(first_scale_ptr, first_at, mask, first_length, 3)
                second = load_several(second_scale_ptr, second_at, mask, second_length, 3)
            else:
                first = load_several(first_scale_ptr, first_at, first_at < first_length, first_length, 3)
            factor, factor_m = make_factors(first, second, KIND, VECTOR_EPS)
        x = make_features(g, p, m, v, factor, factor_m, MOMENTA, FACTORED, CLIPS, RS_EPS)
        if KIND == VECTOR_:
            own = make_line_features(first)
            x = x + own + own
        elif KIND == STRIDED_:
            x = x + make_line_features(load_several(first_ptr, first_at, mask, first_length, 3))
            x = x + make_line_features(load_several(second_ptr, second_at, mask, second_length, 3))
        shared = base
        if KIND == WIDE_:
            line = load_several(first_ptr, first_at, first_at < first_length, first_length, 3)
            of_row = make_line_features(line)
            if DOT:
                total = tl.zeros([HP], tl.float32)
                for k in tl.static_range(LINE_FEATURES_):
                    total += of_row[k] * load_column(first_weights + F + k, H, INPUTS, HP)
                shared = base + total[None, :]
            else:
                shared = multiply(of_row, base, first_weights + F, LINE_FEATURES_, INPUTS, H)
        if DOT:
            h = dot(stack(x, COUNT, PADDED), w_first, shared, PRECISION)
            out = finish_dot(h, tiles, LAYERS, OUTPUTS, PRECISION)
        else:
            h = multiply(x, shared, first_weights, COUNT, INPUTS, H)
            out = finish_plain(h, rest, H, LAYERS, OUTPUTS)
        delta = -gain * out[0]
        if EXP_MULT != 0:
            delta = delta * tl.exp(EXP_MULT * out[1])
        if DELTA:
            tl.store(out_ptr + load_size(row, SIZES + 10, 1) + at, delta, mask)
        else:
            store_parameter(p_ptr, at, mask, p, delta, lr, decay, seeds, index)


@table_kernel
def _mlp_kernel(
    table,  # int64 [n, COLUMNS]: see features.make_segments
    starts,  # int64 [n + 1]
    num_segments,  # n
    first_ptr,  # [n, H, INPUTS]
    bias_ptr,  # [n, H]
    rest_ptr,  # [K, R], rows rest_stride apart
    gain_ptr,  # [n]
    grads,  # [items], as all that follow
    lr_ptr,
    decay_ptr,
    grad_scale_ptr,
    live_ptr,
    steps_ptr,
    seeds,  # or None
    rest_stride,
    out_ptr,  # steps of all parameters, or None
    KINDS: tl.constexpr,  # a bit for each kind of segment that there is
    COLUMNS: tl.constexpr,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ALIGN: tl.constexpr, G_ALIGN: tl.constexpr, SIZES: tl.constexpr,
    MOMENTA: tl.constexpr, FACTORED: tl.constexpr, CLIPS: tl.constexpr, RS_EPS: tl.constexpr,
    VECTOR_EPS: tl.constexpr, BOUND: tl.constexpr, F: tl.constexpr, INPUTS: tl.constexpr, SANITIZE: tl.constexpr,
    H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, EXP_MULT: tl.constexpr, DELTA: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    segment, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    kind, index = tl.load(row + SIZES + 1), load_index(row, COLUMNS)
    g_ptr, live = load_pointer(grads + index, 0, G_TYPE, G_ALIGN), tl.load(live_ptr + index)
    rates = load_rates(index, lr_ptr, decay_ptr, grad_scale_ptr)
    first, bias = first_ptr + segment * (H * INPUTS), bias_ptr + segment * H
    rest = rest_ptr + load_slot(row, COLUMNS) * rest_stride.to(tl.int64)
    gain = tl.load(gain_ptr + segment)
    for k in tl.static_range(NUM_KINDS_):
        if KINDS & (1 << k):
            if kind == k:
                _move(
                    row, local, index, g_ptr, rates, live, seeds, first, bias, rest, gain, out_ptr, P_TYPE, ALIGN,
                    SIZES, k, MOMENTA, FACTORED, CLIPS, RS_EPS, VECTOR_EPS, BOUND, F, INPUTS, SANITIZE, H, LAYERS,
                    OUTPUTS, EXP_MULT, DELTA, DOT, PRECISION, HP, WIDTH, BLOCK, STEPS,
                )  # fmt: skip


class Plan(NamedTuple):
    """How the kernel multiplies.

    Attributes:
        dot: on tensor cores.
        precision: of their inputs: "ieee" (which needs other units), "tf32" or "bf16".
        block: elements that a program takes at once.
        steps: how often, at most.
        warps: of a program.
    """

    dot: bool
    precision: str
    block: int
    steps: int
    warps: int = WARPS

    @property
    def tile(self) -> Tile:
        """Block, steps and warps: what does not change the formula."""
        return Tile(self.block, self.steps, self.warps)


def count_shared(shape: Shape) -> int:
    """Bytes of shared memory that a program takes at most, where tensor cores multiply; compiled ones take less."""
    padded = max(DOT_HIDDEN, 1 << (shape.hidden - 1).bit_length())
    return 4 * padded**2 * (shape.layers - 1) + 680 * padded + 20_000


def choose_plan(shape: Shape, precision: str = "ieee", dot: bool | None = None) -> Plan:
    """The plan for a shape: tensor cores from `DOT_HIDDEN` on, unless `dot` says otherwise.

    Raises:
        ValueError: the MLP is not one the kernel takes, or there is no such precision.
    """
    fits = 1 <= shape.hidden <= MAX_HIDDEN and shape.layers >= 1
    if not fits or shape.outputs not in (1, 2) or (shape.exp_mult and shape.outputs == 1):
        raise ValueError(
            f"mlp kernel: hidden must be 1 to {MAX_HIDDEN}, outputs 2, or 1 with exp_mult 0, got {shape}. "
            "Use the reference."
        )
    if precision not in PRECISIONS:
        raise ValueError(f"mlp kernel: precision must be one of {PRECISIONS}, got {precision!r}.")
    if shape.hidden >= DOT_HIDDEN if dot is None else dot:
        return Plan(True, precision, TILE_BLOCK if precision == "ieee" else DOT_BLOCK, DOT_STEPS)
    return Plan(False, precision, BLOCK, STEPS)


def sign(family: Family, shape: Shape, plan: Plan, p_dtype: torch.dtype) -> str:
    """For which kernels the same tile is best, for `tuning.find`; of a plan only how it multiplies."""
    return tuning.sign(family, shape, plan.precision if plan.dot else "fma", p_dtype)


def launch_segments(
    segments: Segments,
    weights: MLPWeights,
    items: Items,
    family: Family,
    shape: Shape,
    plan: Plan,
    sanitize: bool = False,
    out: Tensor | None = None,
    kinds: int = features.ALL_KINDS,
) -> None:
    """`reference` for all segments in one launch; parameters in place.

    Args:
        segments: of `features.make_segments(tensors, index, plan.block, place)`, cut by
            `features.by_tiles(plan.block, plan.steps)`.
        weights: float32, contiguous but for the rows of `rest`.
        plan: of `choose_plan`.
        sanitize: entries of the gradients that are not finite count as 0.
        out: write the steps here, float32, each at its segment's place; parameters stay as they are.
        kinds: a bit for each kind among the segments (`1 << kind`); fewer compile faster.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    n = segments.num_segments
    wanted = {"first": (n, shape.hidden, family.num_inputs), "bias": (n, shape.hidden), "gain": (n,)}
    wanted["rest"] = (len(weights.rest), shape.num_rest)
    for name, size in wanted.items():
        found = getattr(weights, name)
        if tuple(found.shape) != size:
            raise ValueError(f"mlp kernel: {name} must have shape {list(size)}, got {list(found.shape)}.")
    folded = {"first": weights.first, "bias": weights.bias, "gain": weights.gain}
    parameters.check_stacks("mlp", folded, segments.table.device, n)
    if weights.rest.stride(-1) != 1 or len(weights.rest) < segments.num_slots:
        raise ValueError(
            f"mlp kernel: rest must have contiguous rows for {segments.num_slots} slots, got shape "
            f"{list(weights.rest.shape)}, strides {weights.rest.stride()}."
        )
    parameters.check_launch("mlp", segments, {}, items)
    if segments.num_blocks == 0:
        return
    dtypes = segments.dtypes[0], items.dtype
    with torch.cuda.device_of(segments.table):
        _mlp_kernel[(segments.num_blocks,)](
            *(segments.table, segments.starts, n, *weights, *items.arguments(dtypes[0]), weights.rest.stride(0), out),
            **_constexprs(family, shape, plan, dtypes, find_aligns(segments, items), kinds, sanitize, out is not None),
            num_warps=plan.warps,
            **OPTIONS,
        )


def _constexprs(
    family: Family,
    shape: Shape,
    plan: Plan,
    dtypes: Sequence[torch.dtype],
    aligns: Sequence[int],
    kinds: int,
    sanitize: bool,
    delta: bool,
) -> dict[str, Any]:
    """The kernel's compile-time constants; dtypes are of parameters and gradients, see `features.find_aligns`."""
    types = {"P_TYPE": TRITON_TYPES[dtypes[0]], "G_TYPE": TRITON_TYPES[dtypes[1]]}
    columns = features.NUM_COLUMNS
    table = {"KINDS": kinds & family.kinds, "COLUMNS": columns + features.NUM_SIZES + 2, "SIZES": columns}
    table |= dict(zip(("ALIGN", "G_ALIGN", "WIDTH"), aligns, strict=True))
    widths = {"F": family.num_features, "INPUTS": family.num_inputs, "H": shape.hidden, "LAYERS": shape.layers}
    outputs = {"OUTPUTS": shape.outputs, "EXP_MULT": shape.exp_mult}
    tiles = {"DOT": plan.dot, "PRECISION": plan.precision, "HP": max(16, triton.next_power_of_2(shape.hidden))}
    tiles |= {"BLOCK": plan.block, "STEPS": plan.steps, "SANITIZE": sanitize, "DELTA": delta}
    return {**types, **table, **features.name_constants(family), **widths, **outputs, **tiles}


def launch(
    group: Sequence[Tensors],
    weights: MLPWeights,
    rates: Rates,
    family: Family,
    shape: Shape,
    plan: Plan | None = None,
    sanitize: bool = False,
    delta: bool = False,
) -> list[Tensor]:
    """`reference` of every parameter of a group; nothing is modified in place.

    Args:
        weights: of all segments, those of one parameter after those of another; `rest` `[1, R]`.
        rates: `[1]` each, of all.
    """
    plan = plan or choose_plan(shape)
    places = list(accumulate_sizes((t.p.numel() for t in group), initial=0))
    steps = torch.empty(places[-1], device=group[0].p.device) if delta else None
    new = [t.p if delta else t.p.clone() for t in group]
    copies = [t._replace(p=p, slot=0) for t, p in zip(group, new, strict=True)]
    parts = [s for i, t in enumerate(copies) for s in features.make_segments(t, i, plan.block, places[i])]
    segments = Segments(parts, features.by_tiles(plan.block, plan.steps))
    every = Rates(*(x.expand(len(group)).contiguous() for x in rates))
    items = parameters.make_items([t.g for t in group], every)
    launch_segments(segments, weights, items, family, shape, plan, sanitize, steps)
    if steps is None:
        return new
    return [x.view(t.p.shape) for x, t in zip(steps.split([t.p.numel() for t in group]), group, strict=True)]


def draw_weights(
    group: Sequence[Tensors], rates: Rates, family: Family, shape: Shape, generator: torch.Generator
) -> MLPWeights:
    """Random weights of the group's segments, the features' normalisation folded in."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device).to(rates.lr.device)

    first = []
    for t in group:
        square = features.all_features(t, rates, family).square().sum(-1).T / max(1, t.group_size)
        scale = torch.nn.functional.pad((square + 1e-5).rsqrt(), (0, family.num_inputs - square.shape[1]))
        first.append(draw(t.groups, shape.hidden, family.num_inputs) * family.num_inputs**-0.5 * scale[:, None])
    count = sum(t.groups for t in group)
    rest = draw(1, shape.num_rest) * shape.hidden**-0.5
    return MLPWeights(torch.cat(first), draw(count, shape.hidden), rest, draw(count).exp() * 0.1)


def sample(
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    family: Family | None = None,
    shape: Shape | None = None,
) -> dict[str, object]:
    """Arguments of `launch`: a matrix and a vector in the middle of a run, which have so many elements together.

    Args:
        generator: numbers are drawn on its device.
        dtype: of parameters and gradients.
    """
    family, shape = family or Family(), shape or Shape(hidden=32)
    group = features.draw_group(features.divide_coordinates(num_coordinates), family, generator, dtype, device)
    rates = parameters.sample_rates(device)
    weights = draw_weights(group, rates, family, shape, generator)
    return {"group": group, "weights": weights, "rates": rates, "family": family, "shape": shape}


def bytes_moved(num_coordinates: int, family: Family | None = None, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: p twice, g, momenta and second moment."""
    family = family or Family()
    return num_coordinates * (2 * param_bytes + grad_bytes + 4 * (family.momenta + family.factored))


def compile_source(
    dtype: torch.dtype,
    family: Family | None = None,
    shape: Shape | None = None,
    plan: Plan | None = None,
    p_dtype: torch.dtype = torch.float32,
    kinds: int = features.ALL_KINDS,
) -> CompileSource:
    """The kernel specialised to a family, an MLP and parameters and gradients of `p_dtype`."""
    family, shape = family or Family(), shape or Shape(hidden=32)
    plan, aligns = plan or choose_plan(shape), (ALIGNMENT,) * 3
    constexprs = _constexprs(family, shape, plan, (p_dtype, p_dtype), aligns, kinds, sanitize=False, delta=False)
    constexprs |= {"seeds": None, "out_ptr": None}
    options = {"num_warps": plan.warps, **OPTIONS}
    return specialize(_mlp_kernel, constexprs, options, **parameters.TYPES | {"rest_stride": "i32"})


OP = make_op(__name__)
