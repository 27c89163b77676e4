"""What an elementwise formula says of itself, its definition for a whole step, and samples of inputs for tests.

A formula says what becomes of one coordinate. Its definition is plain PyTorch, its update is Triton, in the same file
and the same order of operations; `driver` makes an op of it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from lopt_kernels.launching import parameters
from lopt_kernels.launching.language import jit, tl
from lopt_kernels.launching.parameters import Rates

State = tuple[Tensor, ...]
BLOCK = 1024  # coordinates per program of formulas without layers


@jit
def keep_weights(weights, numbers, step, SIZES: tl.constexpr):
    """The `prepare` of formulas whose update takes the meta-weights as they are: nothing is made once per program.

    Formulas without a `prepare` of their own have this one.
    """
    return weights


@dataclass(frozen=True)
class Layers:
    """What a formula that runs a small network for every coordinate says beside.

    Attributes:
        weight_shapes: width -> shapes of one set of meta-weights, whose type has the width as `hidden`.
        state_shapes: width -> shapes of the state's tensors before the dimension of coordinates.
        draw_weights: `(width, generator)` -> one set.
        configure: `(width, dtype of the state, precision)` -> how many coordinates a program takes at once, and what
            the update gets as `SIZES`.
        hidden, max_hidden: the width of samples, and the largest that fits the registers.
        block, warps: of a program: coordinates, and threads / 32.
        state_dtypes: what the state may be.
    """

    weight_shapes: Callable[[int], Sequence[tuple[int, ...]]]
    state_shapes: Callable[[int], Sequence[tuple[int, ...]]]
    draw_weights: Callable[[int, torch.Generator], Sequence[Tensor]]
    configure: Callable[[int, torch.dtype, str], tuple[int, Any]]
    hidden: int = 20
    max_hidden: int = 64
    block: int = 64
    warps: int = 8
    state_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Formula:
    """One elementwise update rule: its definition in plain PyTorch, its update in Triton, and what tests draw for it.

    Attributes:
        name: the key in `OPS`.
        rules: names of lopt's rules that are this formula: their meta-weights are named as the fields of `weights`,
            their accumulators as `keys`, and they have the `numbers` for attributes.
        weights: a NamedTuple of the meta-weights, one set of them.
        keys: names of the state's tensors, in order.
        reference: `(p, g, state, weights, step, **numbers)` -> the step and the new state; all is float32.
        update: `jit`: `(p, g, state, prepared, where, SIZES)` -> the step. It has the values of parameter (with
            layers: None) and gradient, and pointers to the state, which it reads by `load_state` and writes by
            `store_state`; `where` are its coordinates, which of them are there, and how many the parameter has.
        prepare: `jit`: `(weights, numbers, step, SIZES)` -> what `update` gets as `prepared`, made once per program.
            Weights that are one number arrive as their value, others as pointers.
        numbers: names and usual values of numbers that are no meta-weights.
        expand: numbers by name -> what the kernel gets; by default the numbers.
        ranges: where the meta-weights are drawn from, if there are no layers: they are one number each then.
        draw_state: `(scale [N], width, generator)` -> a state in the middle of a run, for gradients of that scale.
        layers: see `Layers`; None: there are none.
    """

    name: str
    rules: tuple[str, ...]
    weights: Callable[..., Any]
    keys: tuple[str, ...]
    reference: Callable[..., tuple[Tensor, State]]
    update: Any
    prepare: Any = keep_weights
    numbers: Mapping[str, float] = field(default_factory=dict)
    expand: Callable[..., tuple[float, ...]] = lambda **numbers: tuple(numbers.values())
    ranges: tuple[tuple[float, float], ...] = ()
    draw_state: Callable[[Tensor, int, torch.Generator], Sequence[Tensor]] | None = None
    layers: Layers | None = None

    @property
    def block(self) -> int:
        """Coordinates per program: those of the layers, which take the registers, or `BLOCK` for formulas without.

        Tables are cut by it, `by_elements(formula.block)`.
        """
        return BLOCK if self.layers is None else self.layers.block

    @property
    def state_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the state may be: float32 for formulas without layers, else what the layers say.

        All tensors of a state have the same one; launches refuse others.
        """
        return (torch.float32,) if self.layers is None else self.layers.state_dtypes

    def find_hidden(self, hidden: int | None = None) -> int:
        """The width that samples and compiled kernels have: `hidden` where it is given, else the layers' own.

        It is 0 for formulas without layers, whose weights are numbers.
        """
        return 0 if self.layers is None else hidden or self.layers.hidden

    def list_weight_shapes(self, hidden: int) -> Sequence[tuple[int, ...]]:
        """Shapes of one set of meta-weights, in the order of the fields of `weights`, for layers of this width.

        Launches check stacks `[K, *shape]` against them. Without layers each is one number, `()`.
        """
        return ((),) * len(self.ranges) if self.layers is None else self.layers.weight_shapes(hidden)

    def list_state_shapes(self, hidden: int) -> Sequence[tuple[int, ...]]:
        """Shapes of the state's tensors in the order of `keys`, before the dimension of coordinates.

        `()` for one number per coordinate, `(hidden,)` for a vector of a layer.
        """
        return ((),) * len(self.keys) if self.layers is None else self.layers.state_shapes(hidden)


def reference(
    formula: Formula,
    p: Tensor,
    g: Tensor,
    state: State,
    weights: Any,
    rates: Rates,
    step: Tensor,
    seeds: Tensor | None = None,
    sanitize: bool = False,
    **numbers: float,
) -> tuple[Tensor, State]:
    """One step of one flat parameter; pure.

    Args:
        p: float32, bfloat16 or float16 `[N]`.
        g: `[N]`, in the dtype of p or float32.
        state: `[..., N]` each, all of one of the formula's dtypes.
        weights: float32, one set.
        rates: float32 `[1]` each.
        step: updates made so far, a number in float32 `[1]`.
        seeds: int64 `[1]`: a bfloat16 p is rounded at random.
        sanitize: entries of g that are not finite count as 0.
        numbers: those of the formula that are not as usual.
    Returns:
        The new p and state, each rounded once.
    """
    # as kernels do it: everything to fp32 first, and each result rounded once
    g = parameters.read_gradient(g, rates, sanitize)
    old = tuple(s.float() for s in state)
    delta, new = formula.reference(p.float(), g, old, weights, step, **{**formula.numbers, **numbers})
    rounded = tuple(x.to(s.dtype) for x, s in zip(new, state, strict=True))
    return parameters.move_parameter(p, delta, rates, seeds), rounded


def sample(
    formula: Formula,
    num_coordinates: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
    hidden: int | None = None,
) -> dict[str, object]:
    """Arguments of `reference` and `launch` in the middle of a run; coordinates differ in scale by orders.

    Args:
        num_coordinates: N, may be 0.
        generator: numbers are drawn on its device.
        dtype: of the state; parameter, gradient and weights are float32.
        device: where the tensors go.
        hidden: width of layers, the formula's own by default.
    """
    hidden = formula.find_hidden(hidden)
    p = torch.randn(num_coordinates, generator=generator, device=generator.device, dtype=torch.float32)
    # over orders of magnitude, so that coordinates mixed up by a kernel are seen
    scale = 10 ** (
        2 * torch.randn(num_coordinates, generator=generator, device=generator.device, dtype=torch.float32) - 2
    )
    (g,) = draw_scaled(scale, 1, generator)
    draw_state = formula.draw_state or partial(_draw_state, len(formula.keys))
    draw_weights = partial(_draw_between, formula.ranges) if formula.layers is None else formula.layers.draw_weights
    return {
        "p": p.to(device),
        "g": g.to(device),
        "state": tuple(s.to(device, dtype) for s in draw_state(scale, hidden, generator)),
        "weights": formula.weights(*(w.to(device) for w in draw_weights(hidden, generator))),
        "rates": parameters.sample_rates(device),
        "step": torch.tensor([6.0], device=device, dtype=torch.float32),
    }


def draw_scaled(scale: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normal numbers times a scale for each coordinate, so that coordinates differ by orders: for samples.

    Args:
        scale: `[N]`, on the generator's device.
    Returns:
        `count` tensors `[N]`.
    """
    return (
        torch.randn(count, len(scale), generator=generator, device=generator.device, dtype=torch.float32) * scale
    ).unbind()


def draw_moments(scale: Tensor, hidden: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First moment m and second moment of gradients of this scale, for samples.

    The second is at least m^2, as that of a real run. It is the `draw_state` of formulas with two moments.

    Args:
        scale: `[N]`, on the generator's device.
        hidden: unused, as these formulas have no layers.
    Returns:
        Two tensors `[N]`.
    """
    m, spread = draw_scaled(scale, 2, generator)
    return m, spread.square() + m.square()


def _draw_state(count: int, scale: Tensor, hidden: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The state of formulas that do not say what theirs looks like."""
    return draw_scaled(scale, count, generator)


def _draw_between(ranges: Sequence[tuple[float, float]], hidden: int, generator: torch.Generator) -> list[Tensor]:
    """One number from each range."""
    share = torch.rand(len(ranges), generator=generator, device=generator.device, dtype=torch.float32)
    return [low + (high - low) * x for (low, high), x in zip(ranges, share, strict=True)]


def bytes_moved(
    formula: Formula,
    num_coordinates: int,
    state_bytes: int = 4,
    param_bytes: int = 4,
    grad_bytes: int = 4,
    hidden: int | None = None,
) -> int:
    """Bytes one step has to move at least: p and the state twice, g, the weights and a segment's four numbers.

    Benchmarks compare a kernel's time with what copying these would take.

    Args:
        state_bytes, param_bytes, grad_bytes: sizes of one number.
        hidden: width of layers, the formula's own by default.
    """
    hidden = formula.find_hidden(hidden)
    num_states, num_weights = (
        sum(map(prod, shapes)) for shapes in (formula.list_state_shapes(hidden), formula.list_weight_shapes(hidden))
    )
    # p and the state are read and written, g is read
    per_coordinate = 2 * param_bytes + grad_bytes + 2 * num_states * state_bytes
    return num_coordinates * per_coordinate + 4 * (num_weights + 4)
