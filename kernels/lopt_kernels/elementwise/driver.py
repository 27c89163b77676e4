"""The one kernel of all elementwise formulas: it receives a formula's update as a compile-time function.

Everything but the update is here, once: the segment table, which parameters are live, dtypes, gradients as rules see
them, the write of the parameter, checks, the launch, and what is compiled without a GPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005, SIM108 (Triton concatenates tuples, and tests constants apart from values)

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch

from lopt_kernels.elementwise import formula as formulas
from lopt_kernels.elementwise.formula import Formula
from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import jit, table_kernel, tl
from lopt_kernels.launching.op import CompileSource, Op, specialize
from lopt_kernels.launching.parameters import Items, load_gradient, load_rates, store_parameter
from lopt_kernels.launching.segments import Segments, find_row, load_index, load_pointer, load_size, load_slot


@jit
def load_state(pointer, where):
    """The values of one tensor of the state `[N]` at a tile's coordinates, widened to fp32; 0 where there are none.

    For updates of formulas, with the `where` that they are given.
    """
    at, mask, _ = where
    return tl.load(pointer + at, mask, 0.0).to(tl.float32)


@jit
def store_state(pointer, value, where):
    """Write one tensor of the state `[N]` in place at a tile's coordinates, rounded once from fp32 to its dtype."""
    at, mask, _ = where
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask)


@jit
def _find_weights(weights, slot, STRIDES: tl.constexpr):
    """A slot's weights from pointers to the stacks: the value of what is one number, else a pointer."""
    found = ()
    for i in tl.static_range(len(STRIDES)):
        if STRIDES[i] == 0:
            found = found + (tl.load(weights[i] + slot),)
        else:
            found = found + (weights[i] + slot * STRIDES[i],)
    return found


@jit
def _find_state(row, COUNT: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to the state's tensors, which come behind the parameter in a row of the table."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (load_pointer(row, 1 + i, DTYPE, ALIGN),)
    return found


@jit
def _count_tiles(size, block, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """How many of a program's tiles have coordinates: the last block of a segment may have fewer."""
    count = TILES  # known for one tile: the loop goes
    if TILES > 1:
        count = tl.minimum(tl.cdiv(size - block * (BLOCK * TILES), BLOCK), TILES).to(tl.int32)
    return count


@jit
def _move(
    p_ptr, g_ptr, state, where, prepared, rates, seeds, index,
    UPDATE: tl.constexpr, SIZES: tl.constexpr, LIGHT: tl.constexpr, SANITIZE: tl.constexpr,
):  # fmt: skip
    """One tile: gradient in, state in place, parameter out."""
    at, mask, _ = where
    lr, decay, grad_scale = rates
    g = load_gradient(g_ptr, at, mask, grad_scale, SANITIZE)
    if LIGHT:
        p = tl.load(p_ptr + at, mask, 0.0).to(tl.float32)
        delta = UPDATE(p, g, state, prepared, where, SIZES)
    else:  # layers take the registers: the parameter is read behind them
        delta = UPDATE(None, g, state, prepared, where, SIZES)
        p = tl.load(p_ptr + at, mask, 0.0).to(tl.float32)
    store_parameter(p_ptr, at, mask, p, delta, lr, decay, seeds, index)


def _name_kernel(specialization: Any) -> str:
    """What profilers show: the file of the update."""
    module: str = specialization.constants["UPDATE"].__module__
    return module.rpartition(".")[2] + "_kernel"


@table_kernel(repr=_name_kernel)
def elementwise_kernel(
    table,  # int64 [n, COLUMNS]: p, state ..., N, index, slot
    starts,  # int64 [n + 1]
    num_segments,  # n
    weights,  # a tuple of [K, ...]
    numbers,  # a tuple, or None
    grads,  # [n], as all that follow
    lr_ptr,
    decay_ptr,
    grad_scale_ptr,
    live_ptr,
    steps_ptr,
    seeds,  # or None
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    STRIDES: tl.constexpr,  # of a weight from slot to slot; 0: it is one number
    NUM_STATES: tl.constexpr,
    SIZES: tl.constexpr,  # the formula's own
    P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    G_ALIGN: tl.constexpr,
    S_TYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    BLOCK: tl.constexpr,  # coordinates at once
    TILES: tl.constexpr,  # of a program
    LIGHT: tl.constexpr,  # no layers
    SANITIZE: tl.constexpr,
):
    """One program's coordinates of one segment; nothing is written of what is not live.

    Gradient in, state in place, parameter out. The formula is PREPARE, called once per program, and UPDATE, called once
    per tile.
    """
    _, row, block = find_row(table, starts, num_segments, tl.program_id(0), COLUMNS)
    index = load_index(row, COLUMNS)
    if tl.load(live_ptr + index):
        p = load_pointer(row, 0, P_TYPE, ALIGN)
        g = load_pointer(grads + index, 0, G_TYPE, G_ALIGN)
        state = _find_state(row, NUM_STATES, S_TYPE, ALIGN)
        size = load_size(row, 1 + NUM_STATES, MULTIPLE)
        own = _find_weights(weights, load_slot(row, COLUMNS), STRIDES)
        prepared = PREPARE(own, numbers, tl.load(steps_ptr + index), SIZES)
        rates = load_rates(index, lr_ptr, decay_ptr, grad_scale_ptr)
        tiles = _count_tiles(size, block, BLOCK, TILES)
        for tile in tl.range(tiles, num_stages=1, disable_licm=True):  # weights stay in the cache, not in registers
            start = (block * TILES + tile) * BLOCK
            at = start + tl.arange(0, BLOCK)
            if LIGHT and start + BLOCK <= size:  # no mask: wide loads whatever the size
                everywhere = tl.full((BLOCK,), True, tl.int1)
                _move(
                    p, g, state, (at, everywhere, size), prepared, rates, seeds, index, UPDATE, SIZES, LIGHT, SANITIZE
                )
            else:
                _move(p, g, state, (at, at < size, size), prepared, rates, seeds, index, UPDATE, SIZES, LIGHT, SANITIZE)


def launch_segments(
    formula: Formula,
    segments: Segments,
    weights: Any,
    items: Items,
    sanitize: bool = False,
    precision: str = "ieee",
    **numbers: float,
) -> None:
    """`reference` for all segments in one Triton launch, in place.

    All is float32, with one rounding at the store, but for what `precision` says.

    Args:
        segments: of p and the state and sizes (N,), cut by `by_elements(formula.block)`. p float32, bfloat16 or
            float16; the state all of one of the formula's dtypes; gradients of p's dtype or float32.
        weights: float32 `[K, ...]` each.
        items: of the parameters; the caller counts steps.
        sanitize: entries of the gradients that are not finite count as 0.
        precision: of products of matrices, "ieee" or "tf32"; formulas without layers have none.
        numbers: those of the formula that are not as usual.
    Raises:
        ValueError: a shape, dtype, device or layout the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    hidden = getattr(weights, "hidden", 0)
    parameters.check_dtypes(formula.name, segments, formula.state_dtypes, len(formula.keys))
    _check_weights(formula, weights, hidden)
    parameters.check_launch(formula.name, segments, weights._asdict(), items)
    given = formula.expand(**{**formula.numbers, **numbers})
    constants = _make_constants(formula, hidden, segments.dtypes[1], precision)
    constants |= segments.constexprs() | parameters.type_constexprs(segments.dtypes) | items.constexprs()
    if segments.num_blocks:
        with torch.cuda.device_of(segments.table):
            elementwise_kernel[(segments.num_blocks,)](
                *(segments.table, segments.starts, segments.num_segments, tuple(weights), given or None),
                *items.arguments(segments.dtypes[0]),
                **constants,
                SANITIZE=sanitize,
            )


def _check_weights(formula: Formula, weights: Any, hidden: int) -> None:
    """The meta-weights are stacks `[K, ...]` of the formula's shapes, whose layers fit the registers.

    Raises:
        ValueError: they are not.
    """
    # a wider layer would compile, but spill
    limit = 0 if formula.layers is None else formula.layers.max_hidden
    if limit and not 1 <= hidden <= limit:
        raise ValueError(f"{formula.name} kernel: H must be 1 to {limit}, got {hidden}. Use the reference.")
    count, shapes = len(weights[0]), formula.list_weight_shapes(hidden)
    for (name, stack), shape in zip(weights._asdict().items(), shapes, strict=True):
        if stack.shape != (count, *shape):
            raise ValueError(
                f"{formula.name} kernel: {name} must have shape {[count, *shape]}, got {list(stack.shape)}."
            )


def _make_constants(formula: Formula, hidden: int, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """The kernel's compile-time constants and options beyond those of table and dtypes, for a state of `dtype`."""
    block, sizes, warps = formula.block, (), 4
    if formula.layers is not None:
        (block, sizes), warps = formula.layers.configure(hidden, dtype, precision), formula.layers.warps
    strides = tuple(prod(shape) if shape else 0 for shape in formula.list_weight_shapes(hidden))
    return {
        "PREPARE": formula.prepare,
        "UPDATE": formula.update,
        "STRIDES": strides,
        "NUM_STATES": len(formula.keys),
        "SIZES": sizes,
        "BLOCK": block,
        "TILES": formula.block // block,
        "LIGHT": formula.layers is None,
        "num_warps": warps,
        "enable_fp_fusion": True,
    }


def compile_source(
    formula: Formula,
    dtype: torch.dtype,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    seeded: bool = False,
    hidden: int | None = None,
    precision: str = "ieee",
) -> CompileSource:
    """The kernel of a formula, specialised as for a large model, to be compiled and inspected where no GPU is.

    Args:
        dtype: of the state.
        p_dtype, g_dtype: of parameters and gradients.
        seeded: with stochastic rounding.
        hidden: width of layers, the formula's own by default.
        precision: of products of matrices, "ieee" or "tf32".
    """
    hidden = formula.find_hidden(hidden)
    constants = parameters.compile_constants((p_dtype, g_dtype, dtype), 1 + len(formula.keys) + 3, seeded)
    constants |= _make_constants(formula, hidden, dtype, precision)
    options = {key: constants.pop(key) for key in ("num_warps", "enable_fp_fusion")}
    numbers = formula.expand(**formula.numbers)
    types = {"weights": ("*fp32",) * len(constants["STRIDES"]), "numbers": ("fp32",) * len(numbers)}
    # a formula without numbers gets None, as in `launch_segments`
    if not numbers:
        constants["numbers"] = None
    return specialize(elementwise_kernel, constants, options, **{**parameters.TYPES, **types})


def make_elementwise_op(formula: Formula) -> Op:
    """The op of a formula, to be named in `OPS`: its reference, launches, samples and figures.

    All are derived from the description, so that a new formula is one file and one line of `OPS`.
    """
    launch = partial(launch_segments, formula)
    return Op(
        name=formula.name,
        reference=partial(formulas.reference, formula),
        launch=partial(parameters.launch_flat, launch, formula.block),
        launch_segments=launch,
        sample=partial(formulas.sample, formula),
        bytes_moved=partial(formulas.bytes_moved, formula),
        compile_source=partial(compile_source, formula),
        state_dtypes=formula.state_dtypes,
        block=formula.block,
        formula=formula,
    )
