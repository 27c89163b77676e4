"""Vectors of a layer as tuples of tiles, so that layers wider than the registers hold at once can be multiplied.

Feature-major: one vector for each of BLOCK coordinates is a tuple of tiles `[TILE, BLOCK]`; rows behind the last are 0.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from lopt_kernels.launching.language import jit, tl


@jit
def multiply_tiles(
    x, acc, w,
    ROWS: tl.constexpr, COLS: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """acc + W x: x is IN tiles `[TILE, BLOCK]`, acc and the result are OUT tiles.

    W `[ROWS, COLS]` is read through strides ROW and COL, so that the backward pass multiplies by its transpose. Exact
    products in fp32.
    """
    out = ()
    for j in tl.static_range(OUT):
        y = acc[j]
        row = j * TILE + tl.arange(0, TILE).to(tl.int64)[:, None]
        for k in tl.static_range(IN):
            col = k * TILE + tl.arange(0, TILE).to(tl.int64)
            tile = tl.load(w + row * ROW + col * COL, (row < ROWS) & (col < COLS), 0.0)
            y = tl.dot(tile, x[k], y, input_precision="ieee")
        out = out + (y,)
    return out


@jit
def load_tiles(x_ptr, start, stride, column, in_column, ROWS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """ROWS rows of a matrix from its row `start` on, at some columns `[BLOCK]`.

    TILES tiles `[TILE, BLOCK]`, zeros where no row or column is. Rows are `stride` apart.
    """
    out = ()
    for j in tl.static_range(TILES):
        row = j * TILE + tl.arange(0, TILE)[:, None]
        out = out + (tl.load(x_ptr + (start + row) * stride + column, (row < ROWS) & in_column, 0.0),)
    return out


@jit
def store_tiles(
    x_ptr, x, start, stride, column, in_column, ROWS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    """Write ROWS rows of a matrix from its row `start` on, at some columns, from TILES tiles `[TILE, BLOCK]`.

    Padded rows and columns are left out. The counterpart of `load_tiles`.
    """
    for j in tl.static_range(TILES):
        row = j * TILE + tl.arange(0, TILE)[:, None]
        tl.store(x_ptr + (start + row) * stride + column, x[j], (row < ROWS) & in_column)


@jit
def load_column(x_ptr, ROWS: tl.constexpr, j: tl.constexpr, TILE: tl.constexpr):
    """Tile number j, `[TILE, 1]`, of a vector of ROWS numbers; zeros behind them.

    Biases and output weights are such vectors, and are broadcast over coordinates.
    """
    row = j * TILE + tl.arange(0, TILE)
    return tl.load(x_ptr + row, row < ROWS, 0.0)[:, None]


@jit
def activate(h, ROWS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """ReLU, as torch does it with NaN; padded rows are made 0: 0 * inf made NaN of them."""
    out = ()
    for j in tl.static_range(TILES):
        keep = (j * TILE + tl.arange(0, TILE) < ROWS)[:, None]
        out = out + (tl.where(keep & ~(h[j] <= 0), h[j], 0.0),)
    return out


@jit
def mask_inactive(d, active, TILES: tl.constexpr):
    """The gradient before a ReLU from that behind it, tile by tile, given its results `active`.

    0 in padded rows, as they are never active.
    """
    out = ()
    for j in tl.static_range(TILES):
        out = out + (tl.where(active[j] <= 0, 0.0, d[j]),)
    return out


@jit
def make_zeros(TILES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """A vector of zeros for each of BLOCK coordinates: TILES tiles `[TILE, BLOCK]` in fp32.

    Products without a bias, as those of the backward pass, are added to it.
    """
    out = ()
    for _ in tl.static_range(TILES):
        out = out + (tl.zeros([TILE, BLOCK], tl.float32),)
    return out
