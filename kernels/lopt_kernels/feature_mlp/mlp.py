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

from lopt_kernels.feature_mlp import features, samples, table
from lopt_kernels.feature_mlp.features import (
    LINE_FEATURES,
    Family,
    append_lines,
    load_columns,
    load_row_features,
    load_scales,
    make_factors,
    make_features,
)
from lopt_kernels.feature_mlp.layers import add_row, load_network, run_network
from lopt_kernels.feature_mlp.table import (
    COLUMNS,
    KIND_OF,
    NUM_KINDS,
    PLACE,
    STRIDED,
    VECTOR,
    WIDE,
    Tensors,
    find_aligns,
    find_elements,
    find_lengths,
    find_pointers,
    find_tile,
    load_several,
)
from lopt_kernels.feature_mlp.tiling import BLOCK, Shape, TileChoice, choose_sizes, choose_tiles
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import constant, jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, make_op, specialize
from lopt_kernels.launching.parameters import Items, Rates, clip, load_gradient, load_rates, store_parameter
from lopt_kernels.launching.segments import (
    ALIGNMENT,
    Segments,
    find_row,
    load_index,
    load_pointer,
    load_size,
    load_slot,
)

STATE_DTYPES = (torch.float32,)
OPTIONS = {"enable_fp_fusion": True}


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
    step = table.join_groups(step * -weights.gain[:, None], t)
    return step if delta else parameters.move_parameter(t.p, step, rates)


_WIDE, _STRIDED, _VECTOR = (constant(x) for x in (WIDE, STRIDED, VECTOR))
_NUM_KINDS = constant(NUM_KINDS)
_LINE_FEATURES = constant(LINE_FEATURES)


# -- one program --


@jit
def _load_inputs(
    g, p, pointers, columns, where, lengths, KIND: tl.constexpr, FAMILY: tl.constexpr
):  # a tuple of COUNT vectors
    """The inputs that are an element's own."""
    at, mask = where[0], where[3]
    m = load_several(pointers[1], at, mask, lengths[0], FAMILY.MOMENTA)
    v, factor, factor_m, first = g, m, m, m
    if FAMILY.FACTORED:
        v = tl.load(pointers[2] + at, mask, 0.0)
        if KIND == _VECTOR:
            first = load_several(pointers[3], at, mask, lengths[0], 3)
            second = first
        else:
            first, second = load_scales(pointers, columns, where, lengths, KIND)
        factor, factor_m = make_factors(first, second, KIND, FAMILY.VECTOR_EPS)
    x = make_features(g, p, m, v, factor, factor_m, FAMILY)
    return append_lines(x, first, pointers, where, lengths, KIND)


@jit
def _move(
    row, local, index, g_ptr, rates, live, seeds, network, out_ptr,
    KIND: tl.constexpr, FAMILY: tl.constexpr, MLP: tl.constexpr, P_TYPE: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr, SANITIZE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program's elements of one segment."""
    lr, decay, scale = rates
    first_weights, gain = network[0], network[3]
    pointers = find_pointers(row, P_TYPE, ALIGN)
    lengths = find_lengths(row, KIND, WIDTH_ALIGN)
    start, stop, lane = find_tile(row, local, KIND, WIDTH_ALIGN, BLOCK, STEPS)
    # inputs that are an element's own here: all but those of a matrix's lines
    COUNT: tl.constexpr = FAMILY.INPUTS if KIND == _STRIDED or KIND == _VECTOR else FAMILY.F
    columns, of_columns = (), ()
    if KIND == _WIDE:
        columns, of_columns = load_columns(pointers, lane, lengths)
    base, first_tile, tiles = load_network(network, lane, of_columns, COUNT, KIND, FAMILY, MLP)
    for step in range(start, stop):
        where = find_elements(row, step, lane, live, KIND, WIDTH_ALIGN, BLOCK)
        at, mask = where[0], where[3]
        g = clip(load_gradient(g_ptr, at, mask, scale, SANITIZE), FAMILY.BOUND)
        p = tl.load(pointers[0] + at, mask, 0.0).to(tl.float32)
        x = _load_inputs(g, p, pointers, columns, where, lengths, KIND, FAMILY)
        shared = base
        if KIND == _WIDE:
            of_row = load_row_features(pointers, where, lengths)
            shared = add_row(base, of_row, first_weights + FAMILY.F, FAMILY, MLP)
        out = run_network(x, shared, network, first_tile, tiles, COUNT, FAMILY, MLP)
        delta = -gain * out[0]
        if MLP.EXP_MULT != 0:
            delta = delta * tl.exp(MLP.EXP_MULT * out[1])
        if out_ptr is not None:
            tl.store(out_ptr + load_size(row, PLACE, 1) + at, delta, mask)
        else:
            store_parameter(pointers[0], at, mask, p, delta, lr, decay, seeds, index)


@table_kernel
def _mlp_kernel(
    table,  # int64 [n, COLUMNS]: see table.make_segments
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
    out_ptr,  # steps of all parameters; None: the parameters are moved
    KINDS: tl.constexpr,  # a bit for each kind of segment that there is
    FAMILY: tl.constexpr,
    MLP: tl.constexpr,
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    SANITIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    segment, row, local = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    kind, index = tl.load(row + KIND_OF), load_index(row, COLUMNS)
    g_ptr, live = load_pointer(grads + index, 0, G_TYPE, G_ALIGN), tl.load(live_ptr + index)
    rates = load_rates(index, lr_ptr, decay_ptr, grad_scale_ptr)
    first, bias = first_ptr + segment * (MLP.H * FAMILY.INPUTS), bias_ptr + segment * MLP.H
    rest = rest_ptr + load_slot(row, COLUMNS) * rest_stride.to(tl.int64)
    network = (first, bias, rest, tl.load(gain_ptr + segment))
    for k in tl.static_range(_NUM_KINDS):
        if KINDS & (1 << k):
            if kind == k:
                _move(
                    row, local, index, g_ptr, rates, live, seeds, network, out_ptr, k, FAMILY, MLP, P_TYPE, ALIGN,
                    WIDTH_ALIGN, SANITIZE, BLOCK, STEPS,
                )  # fmt: skip


def launch_segments(
    segments: Segments,
    weights: MLPWeights,
    items: Items,
    family: Family,
    shape: Shape,
    choice: TileChoice,
    sanitize: bool = False,
    out: Tensor | None = None,
    kinds: int = table.ALL_KINDS,
) -> None:
    """`reference` for all segments in one launch; parameters in place.

    Args:
        segments: of `table.make_segments(tensors, index, choice.block, place)`, cut by
            `table.by_tiles(choice.block, choice.steps)`.
        weights: float32, contiguous but for the rows of `rest`.
        choice: of `choose_tiles`.
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
            **_constexprs(family, shape, choice, dtypes, find_aligns(segments, items), kinds, sanitize),
            num_warps=choice.warps,
            **OPTIONS,
        )


def _constexprs(family: Family, shape: Shape, choice: TileChoice, *others: Any) -> dict[str, Any]:
    """The kernel's compile-time constants; others: see `features.make_constants`."""
    constants = features.make_constants(family, *others)
    return constants | {"MLP": choose_sizes(shape, choice), "BLOCK": choice.block, "STEPS": choice.steps}


def launch(
    group: Sequence[Tensors],
    weights: MLPWeights,
    rates: Rates,
    family: Family,
    shape: Shape,
    choice: TileChoice | None = None,
    sanitize: bool = False,
    delta: bool = False,
) -> list[Tensor]:
    """`reference` of every parameter of a group; nothing is modified in place.

    Args:
        weights: of all segments, those of one parameter after those of another; `rest` `[1, R]`.
        rates: `[1]` each, of all.
    """
    choice = choice or choose_tiles(shape)
    places = list(accumulate_sizes((t.p.numel() for t in group), initial=0))
    steps = torch.empty(places[-1], device=group[0].p.device, dtype=torch.float32) if delta else None
    new = [t.p if delta else t.p.clone() for t in group]
    copies = [t._replace(p=p, slot=0) for t, p in zip(group, new, strict=True)]
    parts = [s for i, t in enumerate(copies) for s in table.make_segments(t, i, choice.block, places[i])]
    segments = Segments(parts, table.by_tiles(choice.block, choice.steps))
    every = Rates(*(x.expand(len(group)).contiguous() for x in rates))
    items = parameters.make_items([t.g for t in group], every)
    launch_segments(segments, weights, items, family, shape, choice, sanitize, steps)
    if steps is None:
        return new
    return [x.view(t.p.shape) for x, t in zip(steps.split([t.p.numel() for t in group]), group, strict=True)]


def draw_weights(
    group: Sequence[Tensors], rates: Rates, family: Family, shape: Shape, generator: torch.Generator
) -> MLPWeights:
    """Random weights of the group's segments for samples, the features' normalisation folded in as `fold` does it.

    Numbers are drawn on the generator's device, and go to that of the rates.
    """

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32).to(rates.lr.device)

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
    group = samples.draw_group(samples.divide_coordinates(num_coordinates), family, generator, dtype, device)
    rates = parameters.sample_rates(device)
    weights = draw_weights(group, rates, family, shape, generator)
    return {"group": group, "weights": weights, "rates": rates, "family": family, "shape": shape}


def bytes_moved(num_coordinates: int, family: Family | None = None, param_bytes: int = 4, grad_bytes: int = 4) -> int:
    """Bytes one launch has to move for a large matrix: p twice, g, momenta and second moment.

    Args:
        param_bytes, grad_bytes: sizes of one number.
    """
    family = family or Family()
    return num_coordinates * (2 * param_bytes + grad_bytes + 4 * (family.momenta + family.factored))


def compile_source(
    dtype: torch.dtype,
    family: Family | None = None,
    shape: Shape | None = None,
    choice: TileChoice | None = None,
    p_dtype: torch.dtype = torch.float32,
    kinds: int = table.ALL_KINDS,
) -> CompileSource:
    """The kernel specialised to a family, an MLP and parameters and gradients of `p_dtype`, which are moved.

    Args:
        dtype: of the accumulators, which is float32.
        kinds: a bit for each kind of segment (`1 << kind`).
    """
    family, shape = family or Family(), shape or Shape(hidden=32)
    choice, aligns = choice or choose_tiles(shape), (ALIGNMENT,) * 3
    constexprs = _constexprs(family, shape, choice, (p_dtype, p_dtype), aligns, kinds, False)
    constexprs |= {"seeds": None, "out_ptr": None}
    options = {"num_warps": choice.warps, **OPTIONS}
    return specialize(_mlp_kernel, constexprs, options, **parameters.TYPES | {"rest_stride": "i32"})


OP = make_op(__name__, block=BLOCK)
