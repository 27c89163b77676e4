"""The MLP of the feature rules from features to outputs, differentiable: a fused forward and a fused backward pass.

Source: Metz et al. 2022, arXiv 2203.11860. What elements share, lines of a matrix among it, is in `base`, as
`lopt.rules.building_blocks.feature_mlp` has it.

The forward pass writes the outputs and keeps its inputs. The backward pass computes the activations again; what the
gradients of the weights are products of, activations and gradients of layers, goes to a buffer of at most `BUFFER`
bytes, chunk after chunk of slots or columns (one chunk and so one launch if all of it fits), and products are added up
in the order of the chunks: the same bits in every run.

Memory of the backward pass beside its results: 4 H (2 L - 1) bytes per coordinate of a chunk for L hidden layers, and
4 H more if the gradient of `base` does not hold that of the first layer.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lopt_kernels.differentiable import autograd
from lopt_kernels.differentiable.autograd import DifferentiableOp, check_tensor, differentiate_once, flatten_slots
from lopt_kernels.differentiable.mlp_kernels import mlp_backward_kernel, mlp_forward_kernel
from lopt_kernels.feature_mlp.tiling import MAX_HIDDEN, Shape
from lopt_kernels.launching.language import triton
from lopt_kernels.launching.op import CompileSource, check_triton, specialize

NAME = "mlp"
MAX_FEATURES, MAX_LAYERS, MAX_OUTPUTS = 128, 3, 4
BLOCKS = {16: 64, 32: 32, MAX_HIDDEN: 16}  # widest layer: coordinates per program that the registers hold
TILE = 32  # rows of one product: larger ones do not fit the registers
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
BUFFER = 2**28  # bytes
SHAPE = Shape(32)  # of samples

Layer = tuple[Tensor, Tensor]


def reference(x: Tensor, base: Tensor, first: Tensor, rest: Sequence[Layer]) -> Tensor:
    """All layers; pure, differentiable any number of times.

    Args:
        x: features `[*batch, F, N]`.
        base: what is added to their product with the first layer, `[*batch, H, N or 1]`.
        first: weights of the first layer `[H, F]`; it and the others may have leading dimensions, those of x.
        rest: weights `[out, in]` and biases `[out]` of the other layers; the last one is linear.
    Returns:
        `[*batch, O, N]`.
    """
    h = base + first @ x
    for weight, bias in rest:
        h = weight @ h.relu() + bias[..., None]
    return h


def can_run(x: Tensor, base: Tensor, first: Tensor, rest: Sequence[Layer]) -> bool:
    """Whether meta-training should take `run_mlp` for these tensors rather than `reference`.

    It should where `autograd.can_differentiate` says so and the layers are those the kernels take: up to `MAX_FEATURES`
    features, up to `MAX_LAYERS` hidden layers of one width up to `MAX_HIDDEN`, and up to `MAX_OUTPUTS` outputs.
    """
    tensors = [x, base, first, *(t for layer in rest for t in layer)]
    return _fits(x, first, rest) and autograd.can_differentiate(*tensors)


def _fits(x: Tensor, first: Tensor, rest: Sequence[Layer]) -> bool:
    """The widths are those that the kernels take."""
    hidden = first.shape[-2]
    even = all(weight.shape[-2] == hidden for weight, _ in rest[:-1])
    widths = 1 <= x.shape[-2] <= MAX_FEATURES and 1 <= hidden <= MAX_HIDDEN
    return even and widths and 1 <= len(rest) <= MAX_LAYERS and 1 <= rest[-1][0].shape[-2] <= MAX_OUTPUTS


def run_mlp(x: Tensor, base: Tensor, first: Tensor, rest: Sequence[Layer]) -> Tensor:
    """`reference` in one Triton launch, its gradient in another one and a few matrix products; of first order.

    Args:
        x: float32 `[*batch, F, N]`, F up to 128.
        base: float32 `[*batch, H, N or 1]`, H up to 128; its batch dimensions may be absent or 1.
        first: float32 `[H, F]`; its leading dimensions and those of `rest` are absent (shared) or can be expanded to
            `batch` (one set per slot).
        rest: float32 weights `[out, in]` and biases `[out]`, of up to two further hidden layers of the same width and
            of up to four outputs.
    Returns:
        float32 `[*batch, O, N]`.
    Raises:
        ValueError: a shape, dtype or device the kernel does not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on; or, in the backward
            pass of a backward pass, that there is none.
    """
    _check_inputs(x, base, first, rest)
    check_triton(NAME, x.device)
    batch, none = x.shape[:-2], torch.Size()
    weights = [flatten_slots(first, batch if first.ndim > 2 else none, 2)]
    per_slot = any(w.ndim > 2 or b.ndim > 1 for w, b in rest)
    pairs = [(t, own) for layer in rest for t, own in zip(layer, (2, 1), strict=True)]
    # one set or one per slot for all of them: kernels step through `rest` by a single stride
    flat = [flatten_slots(t, batch if per_slot else none, own).flatten(1) for t, own in pairs]
    shape = Shape(first.shape[-2], len(rest), rest[-1][0].shape[-2], 0.0)
    out: Tensor = _MLP.apply(
        shape, flatten_slots(x, batch, 2), flatten_slots(base, batch, 2), *weights, torch.cat(flat, 1)
    )
    return out.reshape(*batch, *out.shape[1:])


class _MLP(Function):
    """x `[S, F, N]`, base `[S, H, N or 1]`, first `[S or 1, H, F]`, rest `[S or 1, R]` -> `[S, O, N]`."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, x: Tensor, base: Tensor, first: Tensor, rest: Tensor) -> Tensor:
        slots, features, count = x.shape
        out = x.new_empty(slots, shape.outputs, count)
        constants = _constexprs(shape, features, base.shape[-1] != count)
        with torch.cuda.device_of(x):
            mlp_forward_kernel[(slots * triton.cdiv(count, constants["BLOCK"]),)](
                *(x, base, first, rest, out, count, count, *_strides(first, rest)), **constants, **OPTIONS
            )
        ctx.save_for_backward(x, base, first, rest)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        return None, *differentiate_once(NAME, _differentiate, ctx.shape, needs, *ctx.saved_tensors, dout)


def _strides(first: Tensor, rest: Tensor) -> tuple[int, int]:
    """Numbers between the weights of one slot and of the next."""
    return first[0].numel() if len(first) > 1 else 0, rest.shape[1] if len(rest) > 1 else 0


def _constexprs(shape: Shape, features: int, spread: bool) -> dict[str, Any]:
    """Compile-time constants of both kernels."""
    # the wider the layers, the fewer coordinates the registers hold at once
    widest = max(shape.hidden, features)
    tile, block = min(TILE, max(16, triton.next_power_of_2(widest))), next(b for w, b in BLOCKS.items() if widest <= w)
    sizes = {"F": features, "H": shape.hidden, "LAYERS": shape.layers, "OUTPUTS": shape.outputs, "SPREAD": spread}
    tiles = {"FT": -(-features // tile), "HT": -(-shape.hidden // tile), "TILE": tile, "BLOCK": block}
    return {**sizes, **tiles}


def _divide(num_slots: int, count: int, block: int, bytes_each: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of slots and columns whose buffers, of `bytes_each` per coordinate, are at most `BUFFER` bytes."""
    # whole slots while one fits the buffer, else blocks of columns of one slot at a time
    budget = max(BUFFER // max(1, bytes_each), block)
    slots = max(1, min(num_slots, budget // max(1, count)))
    columns = count if count <= budget else budget // block * block
    for slot in range(0, num_slots, slots):
        for column in range(0, count, max(1, columns)):
            yield slice(slot, min(slot + slots, num_slots)), slice(column, min(column + columns, count))


def _differentiate(
    shape: Shape, needs: tuple[bool, ...], x: Tensor, base: Tensor, first: Tensor, rest: Tensor, dout: Tensor
) -> list[Tensor | None]:
    """Gradients of x, base, first and rest, None where `needs` has False."""
    slots, features, count = x.shape
    hidden, layers = shape.hidden, shape.layers
    spread = base.shape[-1] != count
    dout = dout.contiguous()
    dx, dbase, dfirst, drest = (
        torch.zeros_like(t) if need else None for t, need in zip((x, base, first, rest), needs, strict=True)
    )
    # The gradients of the first layer before its ReLU are those of a base with a column for each coordinate.
    apart = (dfirst is not None or dbase is not None) and (spread or dbase is None)
    rows = (2 * layers - 1 if drest is not None else 0) + apart
    constants = _constexprs(shape, features, spread)
    for part, columns in _divide(slots, count, constants["BLOCK"], 4 * hidden * rows):
        num_slots, width = part.stop - part.start, columns.stop - columns.start

        def allocate(size: int, num_slots: int = num_slots, width: int = width) -> Tensor:
            return x.new_empty(num_slots, size * hidden, width)

        active, dhidden = (allocate(layers), allocate(layers - 1)) if drest is not None else (None, None)
        dlayer = allocate(1) if apart else None if dbase is None else dbase[part, :, columns]
        here = [None if t is None else t[part, :, columns] for t in (x, base if not spread else None, dout, dx)]
        sets = [w[part] if len(w) > 1 else w for w in (first, rest)]
        with torch.cuda.device_of(x):
            mlp_backward_kernel[(num_slots * triton.cdiv(width, constants["BLOCK"]),)](
                *(here[0], base[part] if spread else here[1], *sets, here[2], here[3]),
                *(active, dhidden, dlayer, width, count, width if apart else count, *_strides(first, rest)),
                **constants,
                **OPTIONS,
            )
        # a base of one column per slot gets the sum over the slot's coordinates
        if dbase is not None and spread:
            assert dlayer is not None
            dbase[part] += dlayer.sum(-1, keepdim=True)
        if dfirst is not None:
            assert dlayer is not None
            _accumulate(dfirst, part, dlayer @ x[part, :, columns].mT)
        if drest is not None:
            assert active is not None
            assert dhidden is not None
            _accumulate(drest, part, _differentiate_rest(shape, active, dhidden, dout[part, :, columns]))
    return [dx, dbase, dfirst, drest]


def _differentiate_rest(shape: Shape, active: Tensor, dhidden: Tensor, dout: Tensor) -> Tensor:
    """Gradients `[S, R]` of the layers but the first from their inputs `[S, L H, C]` and their outputs' gradients."""
    parts = []
    inputs = active.split(shape.hidden, 1)
    outputs = [*(dhidden.split(shape.hidden, 1) if shape.layers > 1 else ()), dout]
    for h, d in zip(inputs, outputs, strict=True):
        parts += [(d @ h.mT).flatten(1), d.sum(-1)]
    return torch.cat(parts, 1)


def _accumulate(total: Tensor, part: slice, gradient: Tensor) -> None:
    """Add gradients of some slots: to their own, or to those of the weights that all share."""
    if len(total) > 1:
        total[part] += gradient
    else:
        total += gradient.sum(0, keepdim=True)


def _check_inputs(x: Tensor, base: Tensor, first: Tensor, rest: Sequence[Layer]) -> None:
    """The inputs are what `run_mlp` takes."""
    if x.ndim < 2 or base.ndim < 2 or first.ndim < 2 or any(w.ndim < 2 for w, _ in rest):
        raise ValueError(
            f"mlp kernel: x must be [*batch, F, N], base [*batch, H, N or 1] and weights [..., out, in], got "
            f"{[list(t.shape) for t in (x, base, first, *(w for w, _ in rest))]}."
        )
    if not rest or not _fits(x, first, rest):
        raise ValueError(
            f"mlp kernel: F and H must be 1 to {MAX_FEATURES} and {MAX_HIDDEN}, with 1 to {MAX_LAYERS} hidden layers "
            f"of equal width and 1 to {MAX_OUTPUTS} outputs, got x {list(x.shape)} and weights "
            f"{[list(w.shape) for w in (first, *(w for w, _ in rest))]}. Use the reference."
        )
    (features, count), hidden = x.shape[-2:], first.shape[-2]
    width = 1 if base.shape[-1] == 1 else count
    check_tensor(NAME, "x", x, (features, count), torch.float32, x)
    check_tensor(NAME, "base", base, (hidden, width), torch.float32, x)
    check_tensor(NAME, "first", first, (hidden, features), torch.float32, x)
    for i, (weight, bias) in enumerate(rest):
        check_tensor(NAME, f"weight {i + 2}", weight, (weight.shape[-2], hidden), torch.float32, x)
        check_tensor(NAME, f"bias {i + 2}", bias, (weight.shape[-2],), torch.float32, x)


def sample(
    num_slots: int,
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    num_features: int = 16,
    shape: Shape = SHAPE,
    per_slot: tuple[bool, bool] = (True, False),
    spread: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Layer]]:
    """Arguments of `reference` and `run_mlp`; slots differ in scale.

    Args:
        generator: numbers are drawn on its device.
        dtype: of everything; the kernel takes float32.
        shape: its `exp_mult` does not matter.
        per_slot: whether each slot has a first layer of its own, and the rest.
        spread: base is `[S, H, 1]`.
    """

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32).to(device, dtype)

    scale = 10 ** draw(num_slots, 1, 1)
    leads = [(num_slots,) if own else () for own in per_slot]
    hidden = shape.hidden
    base = draw(num_slots, hidden, 1 if spread else num_coordinates) * scale
    first = draw(*leads[0], hidden, num_features) * num_features**-0.5
    widths = [hidden] * (shape.layers - 1) + [shape.outputs]
    rest = [(draw(*leads[1], width, hidden) * hidden**-0.5, draw(*leads[1], width)) for width in widths]
    return draw(num_slots, num_features, num_coordinates) * scale, base, first, rest


def bytes_moved(
    num_slots: int, num_coordinates: int, num_features: int = 16, shape: Shape = SHAPE, spread: bool = False
) -> tuple[int, int]:
    """Bytes of the forward pass (x, base, outputs) and of the backward pass, weights left out.

    The backward pass reads x, base and the outputs' gradients and writes the gradients of x and base; what the weights'
    gradients are products of is written and read.
    """
    inputs = num_features + (0 if spread else shape.hidden)
    products = 2 * (2 * shape.layers - 1) * shape.hidden + num_features + shape.hidden * (2 if spread else 1)
    forward, backward = inputs + shape.outputs, 2 * inputs + 2 * shape.outputs + products
    return 4 * prod((num_slots, num_coordinates, forward)), 4 * prod((num_slots, num_coordinates, backward))


def compile_sources(
    dtype: torch.dtype = torch.float32, num_features: int = 16, shape: Shape = SHAPE, spread: bool = False
) -> dict[str, CompileSource]:
    """Both kernels for an MLP of this shape, to be compiled and inspected where no GPU is.

    The backward pass has all its results.

    Args:
        dtype: of the state, which this formula does not have: float32.
        num_features: F.
        spread: the base is one column `[H]` per slot.
    Returns:
        `forward` and `backward`.
    """
    assert dtype == torch.float32
    constants = _constexprs(shape, num_features, spread)
    types = dict.fromkeys(["num_columns", "stride", "dfirst_stride", "first_stride", "rest_stride"], "i32")
    kernels = {"forward": mlp_forward_kernel, "backward": mlp_backward_kernel}
    sources = {}
    for name, kernel in kernels.items():
        known = {key: kind for key, kind in types.items() if key in kernel.arg_names}
        sources[name] = specialize(kernel, constants, OPTIONS, **known)
    return sources


OP = DifferentiableOp(
    name=NAME,
    reference=reference,
    run=run_mlp,
    sample=sample,
    bytes_moved=bytes_moved,
    compile_sources=compile_sources,
    state_dtypes=(torch.float32,),
    block=BLOCKS[TILE],
)
