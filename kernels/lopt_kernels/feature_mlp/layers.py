"""Layers of a small network inside of a kernel: by plain multiplications, and on tensor cores.

Source: Metz et al. 2022, arXiv 2203.11860, "small_fc_lopt" and its descendants: linear layers with ReLU between them.
Weights are those of `mlp.MLPWeights`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton concatenates tuples)

from __future__ import annotations

from lopt_kernels.feature_mlp.features import LINE_FEATURES
from lopt_kernels.feature_mlp.table import WIDE
from lopt_kernels.launching.language import INTERPRETED, constant, jit, tl

INTERPRETED_ = constant(INTERPRETED)


@jit
def relu(x):
    """max(x, 0) of any shape; NaN stays NaN, as in torch, so that it stays in its tensor and is seen there."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


# -- plain multiplications: layers are tuples of vectors [BLOCK] --


@jit
def multiply(x, base, w, COUNT: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """base[j] + sum over k < COUNT of w[j, k] x[k], for j < WIDTH: a tuple of WIDTH vectors `[BLOCK]`.

    w points to rows STRIDE apart, and x may be a tuple of vectors or of numbers.
    """
    out = ()
    for j in tl.static_range(WIDTH):
        acc = base[j]
        for k in tl.static_range(COUNT):
            acc += x[k] * tl.load(w + j * STRIDE + k)
        out = out + (acc,)
    return out


@jit
def load_numbers(b, COUNT: tl.constexpr):
    """COUNT numbers one behind the other as a tuple: biases, which plain multiplications start from."""
    out = ()
    for j in tl.static_range(COUNT):
        out = out + (tl.load(b + j),)
    return out


@jit
def finish_plain(h, rest, H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The layers after the first product, by plain multiplications: H vectors `[BLOCK]` -> a tuple of OUTPUTS of them.

    `rest` points to weights and biases one behind the other, as in `mlp.MLPWeights`.
    """
    for layer in tl.static_range(LAYERS):
        active = ()
        for j in tl.static_range(H):
            active = active + (relu(h[j]),)
        if layer + 1 < LAYERS:
            h = multiply(active, load_numbers(rest + H * H, H), rest, H, H, H)
            rest += H * (H + 1)
        else:
            h = multiply(active, load_numbers(rest + OUTPUTS * H, OUTPUTS), rest, H, H, OUTPUTS)
    return h


# -- tensor cores: layers are tiles [BLOCK, HP] --


@jit
def stack(x, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """COUNT vectors [BLOCK] as one operand [BLOCK, PADDED] of a product, zeros behind them.

    PADDED is a power of two: pairs are joined until one is left.
    """
    y = x
    for _ in tl.static_range(PADDED - COUNT):
        y = y + (tl.zeros_like(x[0]),)
    for level in tl.static_range(1, 10):
        if (PADDED >> level) > 0:
            joined = ()
            for i in tl.static_range(PADDED >> level):
                joined = joined + (tl.join(y[i], y[i + (PADDED >> level)]),)
            y = joined
    return tl.reshape(y[0], [x[0].shape[0], PADDED])


@jit
def dot(x, w, acc, PRECISION: tl.constexpr):
    """x w + acc by `tl.dot`, accumulated in fp32: x [BLOCK, K], w [K, HP], inputs rounded as PRECISION says.

    PRECISION is "bf16", or what `tl.dot` calls its input precision ("ieee", "tf32").
    """
    if PRECISION == "bf16":
        x, w = x.to(tl.bfloat16), w.to(tl.bfloat16)
        if INTERPRETED_:  # its tl.dot takes the bits of bf16 for integers
            return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        else:
            return tl.dot(x, w, acc)
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@jit
def load_tile(w, ROWS: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr, HP: tl.constexpr):
    """`[ROWS, COUNT]` of a matrix with STRIDE numbers per row, transposed and padded by zeros: [PADDED, HP].

    It is the right operand of `dot`: units are its columns.
    """
    k, j = tl.arange(0, PADDED), tl.arange(0, HP).to(tl.int64)
    return tl.load(w + j * STRIDE + k[:, None], (j < ROWS) & (k < COUNT)[:, None], 0.0)


@jit
def load_column(w, ROWS: tl.constexpr, STRIDE: tl.constexpr, HP: tl.constexpr):
    """ROWS numbers, STRIDE apart, as a vector [HP] with zeros behind them.

    Such are biases, and the weights of all units on one input.
    """
    j = tl.arange(0, HP).to(tl.int64)
    return tl.load(w + j * STRIDE, j < ROWS, 0.0)


@jit
def load_rest(rest, H: tl.constexpr, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, HP: tl.constexpr):
    """What all elements share of the layers after the first, for `finish_dot`.

    A tuple: tile [HP, HP] and bias [HP] of each further hidden layer, then weights [HP] and bias of each output.
    """
    tiles = ()
    for _ in tl.static_range(LAYERS - 1):
        tiles = tiles + (load_tile(rest, H, H, H, HP, HP), load_column(rest + H * H, H, 1, HP))
        rest += H * (H + 1)
    for i in tl.static_range(OUTPUTS):
        tiles = tiles + (load_column(rest + i * H, H, 1, HP), tl.load(rest + OUTPUTS * H + i))
    return tiles


@jit
def finish_dot(h, tiles, LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr):
    """The layers after the first product, on tensor cores: h [BLOCK, HP] -> a tuple of outputs [BLOCK].

    `tiles` are those of `load_rest`; the few outputs are sums over units and not products of tiles.
    """
    for layer in tl.static_range(LAYERS - 1):
        base = tl.zeros_like(h) + tiles[2 * layer + 1][None, :]
        h = dot(relu(h), tiles[2 * layer], base, PRECISION)
    h = relu(h)
    out = ()
    for i in tl.static_range(OUTPUTS):
        w, b = tiles[2 * (LAYERS - 1 + i)], tiles[2 * (LAYERS - 1 + i) + 1]
        out = out + (tl.sum(h * w[None, :], axis=1) + b,)
    return out


# -- the whole network --

_WIDE = constant(WIDE)
_LINE_FEATURES = constant(LINE_FEATURES)


@jit
def load_network(
    network, lane, columns, COUNT: tl.constexpr, KIND: tl.constexpr, FAMILY: tl.constexpr, MLP: tl.constexpr
):
    """What all of a program's elements share: the first layer's bias with what columns add, and tiles of the layers.

    Returns base, [BLOCK, HP] or a tuple of H vectors or numbers, and, on tensor cores, the first layer's tile [PADDED,
    HP] and those of `load_rest`.
    """
    first, bias, rest, _ = network
    PADDED: tl.constexpr = 16 if COUNT <= 16 else 32
    w = first + FAMILY.F + _LINE_FEATURES  # the weights of the columns' features
    if MLP.DOT:
        first_tile = load_tile(first, MLP.H, COUNT, FAMILY.INPUTS, PADDED, MLP.HP)
        tiles = load_rest(rest, MLP.H, MLP.LAYERS, MLP.OUTPUTS, MLP.HP)
        HP: tl.constexpr = MLP.HP  # Triton 3.6 takes sizes and texts out of a tuple by a name only
        base = tl.zeros([lane.shape[0], HP], tl.float32)
        base += load_column(bias, MLP.H, 1, MLP.HP)[None, :]
        if KIND == _WIDE:
            for k in tl.static_range(_LINE_FEATURES):
                base += columns[k][:, None] * load_column(w + k, MLP.H, FAMILY.INPUTS, MLP.HP)[None, :]
        return base, first_tile, tiles
    else:
        base = load_numbers(bias, MLP.H)
        if KIND == _WIDE:
            base = multiply(columns, base, w, _LINE_FEATURES, FAMILY.INPUTS, MLP.H)
        return base, (), ()  # Triton 3.6 returns no None


@jit
def add_row(base, row, w, FAMILY: tl.constexpr, MLP: tl.constexpr):
    """What is shared, with what a matrix's row adds: its 6 features are numbers, once for all columns.

    base is that of `load_network`; w points to the first layer's weights on rows.
    """
    if MLP.DOT:
        HP: tl.constexpr = MLP.HP
        total = tl.zeros([HP], tl.float32)
        for k in tl.static_range(_LINE_FEATURES):
            total += row[k] * load_column(w + k, MLP.H, FAMILY.INPUTS, MLP.HP)
        return base + total[None, :]
    else:
        return multiply(row, base, w, _LINE_FEATURES, FAMILY.INPUTS, MLP.H)


@jit
def run_network(x, shared, network, first_tile, tiles, COUNT: tl.constexpr, FAMILY: tl.constexpr, MLP: tl.constexpr):
    """All layers for one tile: a tuple of outputs [BLOCK], of which the first is the step before the gain.

    x are COUNT vectors [BLOCK]; `shared` is the base of `load_network`, in a matrix with its row added.
    """
    first, _, rest, _ = network
    PADDED: tl.constexpr = 16 if COUNT <= 16 else 32
    if MLP.DOT:
        PRECISION: tl.constexpr = MLP.PRECISION
        h = dot(stack(x, COUNT, PADDED), first_tile, shared, PRECISION)
        out = finish_dot(h, tiles, MLP.LAYERS, MLP.OUTPUTS, PRECISION)
    else:
        h = multiply(x, shared, first, COUNT, FAMILY.INPUTS, MLP.H)
        out = finish_plain(h, rest, MLP.H, MLP.LAYERS, MLP.OUTPUTS)
    return out
