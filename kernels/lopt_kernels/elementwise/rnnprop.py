"""RNNprop over all segments: moments, Adam-normalised features, dense ELU layer, two LSTM layers, parameter out.

Source: Lv, Jiang & Li 2017, arXiv 1703.03633, section 4. It is lopt's rule "rnnprop", whose step is one launch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt_kernels.elementwise import lstm_layers
from lopt_kernels.elementwise.driver import load_state, make_elementwise_op, store_state
from lopt_kernels.elementwise.formula import Formula, Layers, State, draw_moments
from lopt_kernels.elementwise.lstm_layers import LSTMWeights, run_layers, tanh
from lopt_kernels.launching.language import constant, jit, tl
from lopt_kernels.launching.parameters import power

EPS = 1e-8  # beside the root
TINY = 1e-30  # under the root, as in lopt's rule


class RNNpropWeights(NamedTuple):
    """Meta-weights of the dense layer, which makes H features of two inputs, and of the LSTM and its output layer.

    Float32; one set in `reference`, stacks with a leading dimension K in `launch_segments`.
    """

    w_in: Tensor  # [H, 2]
    b_in: Tensor  # [H]
    w_ih1: Tensor  # [4H, H], as in LSTMWeights from here on
    w_hh1: Tensor
    b1: Tensor
    w_ih2: Tensor
    w_hh2: Tensor
    b2: Tensor
    w_out: Tensor
    b_out: Tensor

    @property
    def hidden(self) -> int:
        """H, the width of the dense layer and of both LSTM layers.

        By it `Formula.list_weight_shapes` and the checks of a launch know the shapes of all other weights.
        """
        return self.w_hh1.shape[-1]


def reference(
    p: Tensor,
    g: Tensor,
    state: State,
    weights: RNNpropWeights,
    step: Tensor,
    beta1: float,
    beta2: float,
    output_scale: float,
) -> tuple[Tensor, State]:
    """The step `[N]` of one flat parameter and its new state, all float32.

    Args:
        state: (h1, c1, h2, c2) `[H, N]` each, first and second moment `[N]`.
        beta1, beta2: decays of the moments.
        output_scale: largest step of a coordinate.
    """
    h1, c1, h2, c2, m, v = state
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    scale = (v / (1 - beta2 ** (step + 1)) + TINY).sqrt() + EPS
    inputs = torch.stack([m / (1 - beta1 ** (step + 1)) / scale, g / scale])
    x = F.elu(weights.w_in @ inputs + weights.b_in[:, None])
    out, vectors = lstm_layers.reference(x, (h1, c1, h2, c2), LSTMWeights(*weights[2:]))
    return output_scale * torch.tanh(out), (*vectors, m, v)


_EPS, _TINY = constant(EPS), constant(TINY)


@jit
def _elu(x):
    near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24))))  # exp(x) - 1 cancels here
    return tl.where(x > 0, x, tl.where(x > -0.05, near, tl.exp(x) - 1))


@jit
def prepare(weights, numbers, step, SIZES: tl.constexpr):
    """What all coordinates of a tensor share: the dense layer, the LSTM's weights, numbers and bias corrections.

    The dense layer is three tiles `[PF, 1]` (the columns of `w_in`, and the bias), the LSTM's weights are pointers, the
    numbers those of `expand`; corrections are 1 - beta^(step + 1).
    """
    w_in, b_in, w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out = weights
    feature = tl.arange(0, SIZES.PF).to(tl.int64)
    in_feature = feature < SIZES.F
    w_m = tl.load(w_in + 2 * feature, in_feature, 0.0)[:, None]
    w_g = tl.load(w_in + 2 * feature + 1, in_feature, 0.0)[:, None]
    bias = tl.load(b_in + feature, in_feature, 0.0)[:, None]
    corrections = (1 - power(numbers[0], step + 1), 1 - power(numbers[1], step + 1))
    return (w_m, w_g, bias), (w_ih1, w_hh1, b1, w_ih2, w_hh2, b2, w_out, b_out), numbers, corrections


@jit
def update(p, g, state, prepared, where, SIZES: tl.constexpr):
    """`reference` of one tile; the parameter itself is no input.

    Moments `[BLOCK]` and LSTM vectors are read and written in place; the step `[BLOCK]`, which is returned in fp32, is
    within plus and minus the output scale.
    """
    dense, weights, numbers, corrections = prepared  # Triton 3.6 takes nested tuples apart in steps only
    w_m, w_g, bias = dense
    correction1, correction2 = corrections
    beta1, beta2, rest1, rest2, output_scale = numbers
    h1, c1, h2, c2, m_ptr, v_ptr = state
    m = beta1 * load_state(m_ptr, where) + rest1 * g
    v = beta2 * load_state(v_ptr, where) + rest2 * g * g
    store_state(m_ptr, m, where)
    store_state(v_ptr, v, where)
    scale = tl.sqrt(v / correction2 + _TINY) + _EPS
    x = _elu(w_m * (m / correction1 / scale) + w_g * (g / scale) + bias)
    x = tl.where((tl.arange(0, SIZES.PF) < SIZES.F)[:, None], x, 0.0)  # 0 * inf made NaN of padded rows
    vectors = (h1, c1, h2, c2)
    out = run_layers(x, vectors, vectors, where, weights, SIZES)
    return output_scale * tanh(out)


def expand(beta1: float, beta2: float, output_scale: float) -> tuple[float, ...]:
    """The numbers as the kernel takes them: both betas, both 1 - beta, and the output scale.

    Differences are computed here in float64, as in `reference`: those of betas near 1 would lose digits in fp32.
    """
    return beta1, beta2, 1 - beta1, 1 - beta2, output_scale


def weight_shapes(hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of one set of `RNNpropWeights`, field by field.

    The dense layer on two inputs, then the LSTM on H features; launches check stacks against them.
    """
    return (hidden, 2), (hidden,), *lstm_layers.weight_shapes(hidden, hidden)


def state_shapes(hidden: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the state of one coordinate, in the order of the op's `keys`.

    `(hidden,)` for the four vectors of both layers, then `()` for both moments.
    """
    return *lstm_layers.state_shapes(hidden), (), ()


def draw_weights(hidden: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random meta-weights for tests and benchmarks, in the order of `RNNpropWeights`, float32.

    They are standard normal in the dense layer; in the LSTM some gates saturate. Numbers are drawn on the generator's
    device.
    """
    dense = (
        torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
        for shape in weight_shapes(hidden)[:2]
    )
    return *dense, *lstm_layers.draw_weights(hidden, hidden, generator)


def draw_state(scale: Tensor, hidden: int, generator: torch.Generator) -> State:
    """Vectors `[H, N]` of both layers and both moments `[N]` in the middle of a run, for tests and benchmarks.

    Args:
        scale: `[N]`, of the gradients whose moments these are.
    """
    return *lstm_layers.draw_state(scale, hidden, generator), *draw_moments(scale, hidden, generator)


def configure(hidden: int, dtype: torch.dtype, precision: str) -> tuple[int, Any]:
    """How many coordinates a program takes at once, and the `Sizes` that its layers are compiled for.

    They are those of an LSTM with as many features as units: the dense layer makes H of them. For a state of `dtype`
    and products of this `precision`.
    """
    return lstm_layers.choose_sizes(hidden, hidden, dtype, precision)


OP = make_elementwise_op(
    Formula(
        name="rnnprop",
        rules=("rnnprop",),
        weights=RNNpropWeights,
        keys=(*lstm_layers.STATE_NAMES, "m", "v"),
        reference=reference,
        prepare=prepare,
        update=update,
        numbers={"beta1": 0.95, "beta2": 0.95, "output_scale": 0.1},
        expand=expand,
        draw_state=draw_state,
        layers=Layers(weight_shapes, state_shapes, draw_weights, configure),
    )
)
