"""AdamW over all segments: parameter and both moments in one pass.

Source: Loshchilov & Hutter 2019, arXiv 1711.05101; equal to torch.optim.AdamW. It is lopt's rule "adamw", whose own
learning rate and decay are meta-weights. A schedule of the rule's learning rate is the caller's: a stack of
meta-weights whose `lr` is scaled.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopt_kernels.elementwise.driver import load_state, make_elementwise_op, store_state
from lopt_kernels.elementwise.formula import Formula, State, draw_moments
from lopt_kernels.launching.language import constant, jit, tl
from lopt_kernels.launching.parameters import power

TINY = 1e-30  # under the root, as in lopt's rule


class AdamWWeights(NamedTuple):
    """Meta-weights of AdamW, float32.

    Numbers `[]` in `reference`, a stack `[K]` each in `launch_segments`, so that every segment may use a set of its
    own. Named as in lopt's rules "adam" and "adamw".
    """

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor


def reference(p: Tensor, g: Tensor, state: State, weights: AdamWWeights, step: Tensor) -> tuple[Tensor, State]:
    """One step of AdamW on one flat parameter, the definition that `update` is tested against; pure, all float32.

    Args:
        p, g: parameter and gradient `[N]`.
        state: first and second moment, `[N]` each.
        step: updates made so far, `[1]`: moments are corrected for `step + 1` of them.
    Returns:
        The step `[N]`, which is p's movement at a learning rate of 1, and the new moments.
    """
    m = torch.lerp(g, state[0], weights.beta1)
    v = weights.beta2 * state[1] + (1 - weights.beta2) * g * g
    m_hat = m / (1 - weights.beta1 ** (step + 1))
    scale = (v / (1 - weights.beta2 ** (step + 1)) + TINY).sqrt() + weights.eps
    return -weights.lr * (m_hat / scale + weights.weight_decay * p), (m, v)


_TINY = constant(TINY)


@jit
def prepare(weights, numbers, step, SIZES: tl.constexpr):
    """What all coordinates of a tensor share: the meta-weights as numbers, and both bias corrections.

    These are 1 - beta^(step + 1), whose powers are computed once per program and not once per coordinate.
    """
    _, _, beta1, beta2, _ = weights
    return weights, 1 - power(beta1, step + 1), 1 - power(beta2, step + 1)


@jit
def update(p, g, state, prepared, where, SIZES: tl.constexpr):
    """`reference` of one tile `[BLOCK]`, in the same order of operations.

    Reads both moments, writes them in place and returns the step in fp32.
    """
    weights, correction1, correction2 = prepared
    lr, weight_decay, beta1, beta2, eps = weights
    m, v = load_state(state[0], where), load_state(state[1], where)
    m = tl.where(beta1 < 0.5, g + beta1 * (m - g), m - (m - g) * (1 - beta1))  # torch.lerp
    v = beta2 * v + (1 - beta2) * g * g
    scale = tl.sqrt(v / correction2 + _TINY) + eps
    store_state(state[0], m, where)
    store_state(state[1], v, where)
    return -lr * (m / correction1 / scale + weight_decay * p)


OP = make_elementwise_op(
    Formula(
        name="adamw",
        rules=("adam", "adamw"),
        weights=AdamWWeights,
        keys=("m", "v"),
        reference=reference,
        prepare=prepare,
        update=update,
        ranges=((3e-3, 6e-3), (1e-2, 2e-2), (0.4, 0.9), (0.98, 0.999), (1e-8, 1e-8)),
        draw_state=draw_moments,
    )
)
