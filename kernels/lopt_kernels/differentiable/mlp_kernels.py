"""The forward and the backward kernel of the MLP of the feature rules, over all slots; `mlp` has their definition.

Vectors of layers are tuples of tiles, so that layers wider than the registers hold at once can be multiplied. The
backward kernel computes the activations again and writes what the gradients of the weights are products of.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from lopt_kernels.launching.language import jit, tl
from lopt_kernels.launching.tiles import (
    activate,
    load_column,
    load_tiles,
    make_zeros,
    mask_inactive,
    multiply_tiles,
    store_tiles,
)


@jit
def _run_hidden(
    x_ptr, base_ptr, first, rest, slot, stride, column, in_column, F: tl.constexpr, H: tl.constexpr,
    LAYERS: tl.constexpr, SPREAD: tl.constexpr, FT: tl.constexpr, HT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Activations of all hidden layers, one behind the other: LAYERS * HT tiles."""
    x = load_tiles(x_ptr, slot * F, stride, column, in_column, F, FT, TILE)
    if SPREAD:
        h = make_zeros(HT, TILE, BLOCK)
        b = ()
        for j in tl.static_range(HT):
            b = b + (h[j] + load_column(base_ptr + slot * H, H, j, TILE),)
        h = b
    else:
        h = load_tiles(base_ptr, slot * H, stride, column, in_column, H, HT, TILE)
    h = activate(multiply_tiles(x, h, first, H, F, F, 1, HT, FT, TILE), H, HT, TILE)
    active = h
    for layer in tl.static_range(LAYERS - 1):
        w = rest + layer * (H * (H + 1))
        b = ()
        for j in tl.static_range(HT):
            b = b + (tl.zeros_like(h[j]) + load_column(w + H * H, H, j, TILE),)
        h = activate(multiply_tiles(h, b, w, H, H, H, 1, HT, HT, TILE), H, HT, TILE)
        active = active + h
    return active


@jit
def _find(num_columns, first, rest, first_stride, rest_stride, BLOCK: tl.constexpr):
    """A program's slot, its columns and the slot's weights."""
    blocks = tl.cdiv(num_columns, BLOCK)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first += slot * first_stride.to(tl.int64)
    return slot, column, first, rest + slot * rest_stride.to(tl.int64)


@jit(do_not_specialize=["first_stride", "rest_stride"])
def mlp_forward_kernel(
    x_ptr,  # [S, F, N]
    base_ptr,  # [S, H, N], or [S, H] with SPREAD
    first,  # [H, F], or S of them
    rest,  # [R], or S of them: weights and biases one behind the other
    out_ptr,  # [S, O, N]
    num_columns,  # N
    stride,  # N
    first_stride, rest_stride,  # between slots: 0 if they share the weights
    F: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, SPREAD: tl.constexpr,
    FT: tl.constexpr, HT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The outputs of one block of a slot's coordinates; equal to `mlp.reference`.

    A program is BLOCK columns of one slot. Hidden activations are not written: the backward pass computes them again
    from the inputs.
    """
    slot, column, first, rest = _find(num_columns, first, rest, first_stride, rest_stride, BLOCK)
    in_column = column < num_columns
    active = _run_hidden(
        x_ptr, base_ptr, first, rest, slot, stride, column, in_column, F, H, LAYERS, SPREAD, FT, HT, TILE, BLOCK
    )
    w = rest + (LAYERS - 1) * (H * (H + 1))
    for i in tl.static_range(OUTPUTS):
        out = tl.zeros([BLOCK], tl.float32) + tl.load(w + OUTPUTS * H + i)
        for j in tl.static_range(HT):
            out += tl.sum(load_column(w + i * H, H, j, TILE) * active[(LAYERS - 1) * HT + j], axis=0)
        tl.store(out_ptr + (slot * OUTPUTS + i) * stride + column, out, in_column)


@jit(do_not_specialize=["first_stride", "rest_stride"])
def mlp_backward_kernel(
    x_ptr, base_ptr, first, rest,  # as above, from a chunk's first slot and column on
    dout_ptr,  # [S, O, N], as they
    dx_ptr,  # [S, F, N], as they, or None
    active_ptr,  # [S, LAYERS * H, C]: activations, or None
    dhidden_ptr,  # [S, (LAYERS - 1) * H, C]: gradients of later layers before their ReLU, or None
    dfirst_ptr,  # [S, H, N or C]: those of the first, or None
    num_columns,  # C: of the chunk
    stride,  # N
    dfirst_stride,  # N or C
    first_stride, rest_stride,
    F: tl.constexpr, H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, SPREAD: tl.constexpr,
    FT: tl.constexpr, HT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a slot's coordinates, from the outputs' gradients back to the features.

    Activations are computed again; dx and, where a pointer is given, what the gradients of weights are products of, are
    written. The products themselves are batched ones of torch, in `mlp`.
    """
    slot, column, first, rest = _find(num_columns, first, rest, first_stride, rest_stride, BLOCK)
    in_column = column < num_columns
    active = _run_hidden(
        x_ptr, base_ptr, first, rest, slot, stride, column, in_column, F, H, LAYERS, SPREAD, FT, HT, TILE, BLOCK
    )
    w = rest + (LAYERS - 1) * (H * (H + 1))
    d = make_zeros(HT, TILE, BLOCK)
    for i in tl.static_range(OUTPUTS):
        dout = tl.load(dout_ptr + (slot * OUTPUTS + i) * stride + column, in_column, 0.0)
        added = ()
        for j in tl.static_range(HT):
            added = added + (d[j] + load_column(w + i * H, H, j, TILE) * dout,)
        d = added
    for layer in tl.static_range(LAYERS - 1, -1, -1):
        h = ()
        for j in tl.static_range(HT):
            h = h + (active[layer * HT + j],)
        d = mask_inactive(d, h, HT)
        if active_ptr is not None:
            start = (slot * LAYERS + layer) * H
            store_tiles(active_ptr, h, start, num_columns, column, in_column, H, HT, TILE)
        if layer > 0:
            if dhidden_ptr is not None:
                start = (slot * (LAYERS - 1) + layer - 1) * H
                store_tiles(dhidden_ptr, d, start, num_columns, column, in_column, H, HT, TILE)
            w = rest + (layer - 1) * (H * (H + 1))
            d = multiply_tiles(d, make_zeros(HT, TILE, BLOCK), w, H, H, 1, H, HT, HT, TILE)
    if dfirst_ptr is not None:
        store_tiles(dfirst_ptr, d, slot * H, dfirst_stride, column, in_column, H, HT, TILE)
    if dx_ptr is not None:
        dx = multiply_tiles(d, make_zeros(FT, TILE, BLOCK), first, F, H, 1, F, FT, HT, TILE)
        store_tiles(dx_ptr, dx, slot * F, stride, column, in_column, F, FT, TILE)
