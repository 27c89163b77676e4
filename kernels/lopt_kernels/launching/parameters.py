"""How a step reaches memory: gradients are read in fp32, parameters are written once, skipped segments not at all.

The formulas are those of `lopt.optim.update.ParameterUpdate`, with one number per parameter. A kernel that updates
parameters calls `load_gradient`, then `store_parameter`, where the parameter is live; its reference calls
`read_gradient` and `move_parameter`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.launching.language import TRITON_TYPES, constant, jit, tl
from lopt_kernels.launching.op import check_triton
from lopt_kernels.launching.random import draw_bits, fold_seed, shift_seed
from lopt_kernels.launching.segments import ALIGNMENT, Segment, Segments, by_elements, find_alignment, upload

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16)
TYPES = {  # of the arguments of kernels that are not pointers to fp32
    **dict.fromkeys(("table", "starts", "grads", "steps_ptr", "seeds"), "*i64"),
    "num_segments": "i32",
    "live_ptr": "*i1",
    **dict.fromkeys(("beta1", "beta2", "rest1", "rest2", "output_scale", "log_bound", "inverse_bound"), "fp32"),
}
HALF_BITS = 16  # of fp32's mantissa that bf16 lacks
HALF_MAX = 65504.0  # the largest number of fp16
# Of a gradient's entries, whatever its dtype. A rule squares gradients, sums the squares over a tensor and multiplies
# second moments: in fp32 products of four entries, and sums of squares over 2^67 of them, are finite.
BOUND = 2.0**30


class Rates(NamedTuple):
    """The numbers of `lopt.optim.update.ParameterUpdate`, float32 `[n]` each, one per parameter.

    Attributes:
        lr: the parameter becomes `p + lr * delta - lr * decay * p`; with 0 not a bit of it changes.
        decay: see above.
        grad_scale: factor on the gradient: 1, negative to maximise, times what takes a gradient scaler's factor out.
    """

    lr: Tensor
    decay: Tensor
    grad_scale: Tensor


class Items(NamedTuple):
    """What a launch has for each of its n parameters beside the table: all that may change from step to step.

    Attributes:
        grads: addresses of the gradients, int64 `[n]`; these are dense, in the order of their parameters' memory.
        rates: see `Rates`.
        live: bool `[n]`; what is not live is not written.
        steps: updates made so far, int64 `[n]`.
        seeds: int64 `[n]`: bfloat16 parameters are rounded at random; None: to nearest.
        dtype: of the gradients.
        align: a power of two that divides all addresses, see `segments.find_alignment`.
    """

    grads: Tensor
    rates: Rates
    live: Tensor
    steps: Tensor
    seeds: Tensor | None
    dtype: torch.dtype
    align: int = 1

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What every kernel that updates parameters of `dtype` takes of these, in this order.

        Gradients' addresses, rate, decay, factor on the gradient, live, steps, and seeds, None unless parameters are
        bfloat16.
        """
        # None is compiled out: kernels of other dtypes have no code for rounding at random
        seeds = self.seeds if dtype == torch.bfloat16 else None
        return (self.grads, *self.rates, self.live, self.steps, seeds)

    def constexprs(self) -> dict[str, Any]:
        """Compile-time constants of a kernel that reads these gradients: their Triton type G_TYPE, and G_ALIGN.

        By the latter, loads of them may be wide.
        """
        return {"G_TYPE": TRITON_TYPES[self.dtype], "G_ALIGN": self.align}


def make_items(
    grads: Sequence[Tensor],
    rates: Rates,
    live: Tensor | None = None,
    steps: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Items:
    """Items of these gradients for one launch, as an op's `launch`, tests and benchmarks need them.

    Args:
        grads: at least one, dense and all of one dtype; their memory must outlive the items, which hold addresses.
        rates: `[n]` each.
        live: bool `[n]`, by default all.
        steps: int64 `[n]`, by default 0.
        seeds: int64 `[n]`, or None: bfloat16 parameters are rounded to nearest.
    """
    device, addresses = rates.lr.device, [g.data_ptr() for g in grads]
    live = torch.ones(len(grads), dtype=torch.bool, device=device) if live is None else live
    steps = torch.zeros(len(grads), dtype=torch.int64, device=device) if steps is None else steps
    on_device = upload(addresses, torch.int64, device)
    return Items(on_device, rates, live, steps, seeds, grads[0].dtype, find_alignment(addresses))


def read_gradient(g: Tensor, rates: Rates, sanitize: bool = False) -> Tensor:
    """The gradient `[N]` as rules see it, in fp32, times `rates.grad_scale`, and within +-`BOUND`.

    What references begin with, and the definition of `load_gradient`; NaN stays NaN.

    Args:
        g: of any floating dtype.
        sanitize: entries that are not finite count as 0.
    """
    g = g.float()
    g = torch.where(g.isfinite(), g, 0.0) if sanitize else g
    return (g * rates.grad_scale).clamp(-BOUND, BOUND)


def move_parameter(p: Tensor, delta: Tensor, rates: Rates, seeds: Tensor | None = None) -> Tensor:
    """The parameter after the step, `p + lr * delta - lr * decay * p`, in fp32 and rounded once.

    What references end with, and the definition of `store_parameter`; fp16 is rounded to a finite number.

    Args:
        p: `[N]`, float32, bfloat16 or float16.
        delta: the step, float32 `[N]`.
        rates: `[1]` each; with an `lr` of 0 not a bit of p changes.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random; None: to nearest.
    """
    # all in fp32: p is rounded once, at the end
    base = p.float()
    rate = rates.lr * rates.decay
    new = torch.where(rate == 0, base, base - rate * base) + rates.lr * delta
    if seeds is not None and p.dtype == torch.bfloat16:
        # a random number below bf16's last bit is added, and the bits behind it cut off: rounded up in proportion
        noise = draw_bits(seeds, 0, p.numel(), HALF_BITS)[0].to(torch.int32)
        bits = (new.view(torch.int32) + noise) & -(1 << HALF_BITS)
        new = torch.where(new.isfinite(), bits.view(torch.float32), new)
    if p.dtype == torch.float16:
        new = new.clamp(-HALF_MAX, HALF_MAX)
    # not `new`: 0 times a step that is not finite is NaN, and -0 + 0 is +0
    return torch.where(rates.lr == 0, p, new.to(p.dtype))


def sample_rates(device: torch.device) -> Rates:
    """Rates of one parameter, `[1]` each, for samples: none of them is neutral.

    So a kernel that leaves out learning rate, decay or sign does not equal its reference.
    """
    return Rates(*(torch.tensor([value], device=device, dtype=torch.float32) for value in (0.7, 0.03, -1.3)))


def launch_flat(
    launch_segments: Callable[..., None],
    block: int,
    p: Tensor,
    g: Tensor,
    state: tuple[Tensor, ...],
    weights: Any,
    rates: Rates,
    step: Tensor,
    out: tuple[Tensor, tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An op's `launch`, for one flat parameter: its `launch_segments` on copies of `p` and `state`.

    Args:
        p, g, state, weights, rates, step: as the op's `reference` takes them.
        out: contiguous tensors to write to, new ones by default; they may be p and the state themselves.
    Returns:
        The new p and state.
    """
    if out is None:
        out = torch.empty_like(p), tuple(torch.empty_like(s) for s in state)
    new_p, new_state = out
    # `launch_segments` works in place: on the results, which begin as copies
    for new, old in zip((new_p, *new_state), (p, *state), strict=True):
        new.copy_(old)
    segments = Segments([Segment((new_p, *new_state), (p.numel(),))], by_elements(block))
    stacks = type(weights)(*(w[None] for w in weights))
    launch_segments(segments, stacks, make_items([g], rates, steps=step.long()))
    return out


def check_launch(
    op: str, segments: Segments, stacks: Mapping[str, Tensor], items: Items, check_dtype: bool = True
) -> None:
    """The tensors beside the table are what every kernel takes.

    Args:
        op: its name, for messages.
        stacks: by name, float32 meta-weights, `[K, ...]` each, for `segments.num_slots` <= K; contiguous.
        check_dtype: the gradients must suit the table's first tensors, which are parameters.
    Raises:
        ValueError: a shape, dtype, device or layout that the kernels do not take.
        RuntimeError: Triton is missing, or it has neither a GPU nor its interpreter to run on.
    """
    check_stacks(op, stacks, segments.table.device, segments.num_slots)
    check_items(op, segments, items, check_dtype)
    check_triton(op, segments.table.device)


def check_stacks(op: str, stacks: Mapping[str, Tensor], device: torch.device, count: int) -> None:
    """Each tensor is a contiguous float32 stack of at least `count` on this device.

    Programs read a slot's meta-weights by offsets, so that any other layout would give them other numbers.

    Args:
        op: its name, for messages.
        stacks: by name.
    Raises:
        ValueError: one is not; it names dtype, device and strides, or the slot that is missing.
    """
    for name, stack in stacks.items():
        if stack.dtype != torch.float32 or stack.device != device or not stack.is_contiguous():
            raise ValueError(
                f"{op} kernel: {name} must be contiguous torch.float32 on {device}, got {stack.dtype} on "
                f"{stack.device}, strides {stack.stride()}. Convert it."
            )
        if len(stack) < count:
            raise ValueError(
                f"{op} kernel: a segment has slot {count - 1}, {name} is a stack of {len(stack)}. "
                "Give every slot its meta-weights."
            )


def check_items(op: str, segments: Segments, items: Items, check_dtype: bool = True) -> None:
    """There is one number for each parameter of the table, of the right dtype and on its device.

    Args:
        op: its name, for messages.
        check_dtype: the gradients must be of the dtype of the table's first tensors, or float32.
    Raises:
        ValueError: it is not so; programs would read beyond the tensors, or other numbers.
    """
    # names for the message, and what programs read each of them as
    device, size = segments.table.device, len(items.grads)
    numbers = [(name, x, torch.float32) for name, x in items.rates._asdict().items()]
    numbers += [("grads", items.grads, torch.int64), ("live", items.live, torch.bool)]
    numbers += [(name, x, torch.int64) for name, x in (("steps", items.steps), ("seeds", items.seeds)) if x is not None]
    for name, x, dtype in numbers:
        if x.dtype != dtype or x.shape != (size,) or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"{op} kernel: {name} must be contiguous {dtype} [{size}] on {device}, got {x.dtype} {list(x.shape)} "
                f"on {x.device}. One number per parameter."
            )
    if size < segments.num_items:
        raise ValueError(f"{op} kernel: a segment is of parameter {segments.num_items - 1}, there are {size}.")
    if check_dtype and items.dtype not in (segments.dtypes[0], torch.float32):
        raise ValueError(
            f"{op} kernel: gradients must be of their parameters' dtype, {segments.dtypes[0]}, or torch.float32, got "
            f"{items.dtype}."
        )


def check_dtypes(op: str, segments: Segments, state_dtypes: tuple[torch.dtype, ...], num_states: int) -> None:
    """The segments' tensors are a parameter and `num_states` tensors of state, of dtypes that the kernel takes.

    Parameters are of one of `PARAMETER_DTYPES`, the state is all of one of `state_dtypes`: kernels read a table's
    addresses as pointers to them.

    Raises:
        ValueError: they are not.
    """
    p, *states = segments.dtypes
    found = len(states) == num_states and len(set(states)) == 1 and states[0] in state_dtypes
    if not (found and p in PARAMETER_DTYPES):
        raise ValueError(
            f"{op} kernel: a segment's tensors must be a parameter (one of {PARAMETER_DTYPES}) and {num_states} state "
            f"tensors (all one of {state_dtypes}), got {segments.dtypes}."
        )


def type_constexprs(dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """Compile-time constants P_TYPE and S_TYPE from the dtypes of parameter and state, the first two of `dtypes`.

    By them kernels read a table's addresses as pointers.
    """
    return dict(zip(("P_TYPE", "S_TYPE"), (TRITON_TYPES[dtype] for dtype in dtypes[:2]), strict=True))


def compile_constants(dtypes: tuple[torch.dtype, ...], columns: int, seeded: bool) -> dict[str, Any]:
    """Compile-time constants of table, dtypes and rounding as in a large model, where all is aligned.

    An op's `compile_source` adds those of its own.

    Args:
        dtypes: of parameter, gradient and state.
        columns: of the table.
        seeded: with stochastic rounding; else the argument `seeds` is None.
    """
    p_dtype, g_dtype, s_dtype = dtypes
    table = {"COLUMNS": columns, "ALIGN": ALIGNMENT, "MULTIPLE": ALIGNMENT, "SANITIZE": False}
    table |= {"G_TYPE": TRITON_TYPES[g_dtype], "G_ALIGN": ALIGNMENT}
    return table | type_constexprs((p_dtype, s_dtype)) | ({} if seeded else {"seeds": None})


_BOUND, _HALF_MAX = constant(BOUND), constant(HALF_MAX)
_TOP_BITS = constant(64 - HALF_BITS)
_KEPT = constant(-(1 << HALF_BITS))


@jit
def load_rates(index, lr_ptr, decay_ptr, grad_scale_ptr):
    """One parameter's `Rates` as numbers in fp32: learning rate, weight decay, and the factor on its gradient.

    Each is read from an array `[n]` at the parameter's index.
    """
    return tl.load(lr_ptr + index), tl.load(decay_ptr + index), tl.load(grad_scale_ptr + index)


@jit
def clip(x, BOUND: tl.constexpr):
    """x within +-BOUND, of any shape; NaN stays NaN, unlike with `tl.minimum` and `tl.maximum`."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@jit
def load_gradient(g, at, mask, scale, SANITIZE: tl.constexpr):
    """`read_gradient` of the elements `at`, in fp32; 0 where `mask` is not.

    `scale` is the parameter's `Rates.grad_scale`; with SANITIZE what is not finite counts as 0.
    """
    x = tl.load(g + at, mask, 0.0).to(tl.float32)
    if SANITIZE:
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return clip(x * scale, _BOUND)


@jit
def store_parameter(p, at, mask, base, delta, lr, decay, seeds, index):
    """`move_parameter` of the elements `at`, whose values were `base`, written in place and rounded once.

    Nothing is written with a learning rate of 0.

    `seeds`: int64 `[n]`, by which bfloat16 is rounded at random, or None.
    """
    rate = lr * decay
    new = tl.where(rate == 0, base, base - rate * base) + lr * delta
    if seeds is not None:
        noise = shift_seed(fold_seed(tl.load(seeds + index), at), _TOP_BITS).to(tl.int32)  # at: int64
        bits = (new.to(tl.int32, bitcast=True) + noise) & _KEPT
        new = tl.where(tl.abs(new) < float("inf"), bits.to(tl.float32, bitcast=True), new)
    if p.dtype.element_ty == tl.float16:
        new = clip(new, _HALF_MAX)
    if lr != 0:
        tl.store(p + at, new.to(p.dtype.element_ty), mask)


@jit
def power(base, exponent):
    """base^exponent for fp32 and non-negative int64, exact to fp32's last bit: bias corrections are 1 minus it."""
    square = tl.cast(base, tl.float32).to(tl.float64)
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * square, result)
        square = square * square
        exponent = exponent >> 1
    return result.to(tl.float32)
