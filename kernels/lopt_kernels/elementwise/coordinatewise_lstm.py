"""The coordinatewise LSTM rule over all segments: gradient in, log/sign features, two LSTM layers, parameter out.

Source: Andrychowicz et al. 2016, arXiv 1606.04474, and its published code (preprocessing with k = 5). It is lopt's rule
"lstm".
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import partial
from math import exp

import torch
from torch import Tensor

from lopt_kernels.elementwise import lstm_layers
from lopt_kernels.elementwise.driver import make_elementwise_op
from lopt_kernels.elementwise.formula import Formula, Layers, State
from lopt_kernels.elementwise.lstm_layers import LSTMWeights, run_layers
from lopt_kernels.launching.language import constant, jit, tl

NUM_FEATURES = 2
EPS = torch.finfo(torch.float32).eps  # under the logarithm


def reference(
    p: Tensor, g: Tensor, state: State, weights: LSTMWeights, step: Tensor, output_scale: float, log_bound: float
) -> tuple[Tensor, State]:
    """The step `[N]` of one flat parameter and the new vectors, all float32.

    Args:
        state: (h1, c1, h2, c2), `[H, N]` each.
        output_scale: factor on the output.
        log_bound: k; gradients below e^-k are passed on linearly.
    """
    magnitude = ((g.abs() + EPS).log() / log_bound).clamp(min=-1)
    sign = (g * exp(log_bound)).clamp(-1, 1)
    h1, c1, h2, c2 = state
    out, new = lstm_layers.reference(torch.stack([magnitude, sign]), (h1, c1, h2, c2), weights)
    return output_scale * out, new


_EPS = constant(EPS)


@jit
def prepare(weights, numbers, step, SIZES: tl.constexpr):
    """What all coordinates of a tensor share: pointers to the layers' weights, and the numbers of `expand`.

    Weights are read where they are multiplied.
    """
    return weights, numbers


@jit
def update(p, g, state, prepared, where, SIZES: tl.constexpr):
    """`reference` of one tile; the parameter itself is no input.

    Makes the two features `[PF, BLOCK]` of the gradients `[BLOCK]`, runs both layers, whose state is written in place,
    and returns the step `[BLOCK]` in fp32.
    """
    weights, numbers = prepared
    output_scale, log_bound, inverse_bound = numbers  # the last is e^k
    magnitude = tl.log(tl.abs(g) + _EPS) / log_bound
    magnitude = tl.where(magnitude < -1, -1.0, magnitude)  # unlike tl.maximum keeps NaN
    sign = g * inverse_bound
    sign = tl.where(sign < -1, -1.0, tl.where(sign > 1, 1.0, sign))
    feature = tl.arange(0, SIZES.PF)[:, None]
    x = tl.where(feature == 0, magnitude, tl.where(feature == 1, sign, 0.0))
    return output_scale * run_layers(x, state, state, where, weights, SIZES)


def expand(output_scale: float, log_bound: float) -> tuple[float, ...]:
    """The numbers as the kernel takes them: output scale, k = `log_bound`, and e^k.

    The last is computed here in float64, as in `reference`, so that both clip the same gradients.
    """
    return output_scale, log_bound, exp(log_bound)


OP = make_elementwise_op(
    Formula(
        name="coordinatewise_lstm",
        rules=("lstm",),
        weights=LSTMWeights,
        keys=lstm_layers.STATE_NAMES,
        reference=reference,
        prepare=prepare,
        update=update,
        numbers={"output_scale": 0.01, "log_bound": 5.0},
        expand=expand,
        draw_state=lstm_layers.draw_state,
        layers=Layers(
            weight_shapes=partial(lstm_layers.weight_shapes, NUM_FEATURES),
            state_shapes=lstm_layers.state_shapes,
            draw_weights=partial(lstm_layers.draw_weights, NUM_FEATURES),
            configure=partial(lstm_layers.choose_sizes, NUM_FEATURES),
        ),
    )
)
