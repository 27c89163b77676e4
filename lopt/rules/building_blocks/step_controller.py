"""How large a step each tensor takes: a learned integrator of the step's logarithm, told what the last steps did.

A rule that normalises its direction leaves one number per tensor to be decided. Feedback on it is in how the next
gradient agrees with the last step, which is the hypergradient of Baydin et al. 2018, arXiv 1703.04782, as a cosine, and
in the gradient's signal to noise. The loss is not asked for: told how it goes, the controller lowered it further where
networks fit all of their data anyway, and ended at higher validation losses (docs/default-rule.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lopt.core.random import make_generator
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock

HIDDEN = 6
OUTPUTS = 2
OUTPUT_SCALES = (1.0, 0.5)  # of the step and the rate, so that one perturbation fits both
# Of the logarithm of all that is decided; what the integrator has above 0 comes on top. With 5 in place of 3, one jump
# of a linear regression was never made good.
STEP_RANGE = (-4.0, 3.0)
GAIN_RANGE = 3.0  # of the integrator, either way
RATE = 0.5
SHARE = 0.1  # of a run in which the integrator may go from 0 to `RATE` times an output of 1
AVERAGE = 0.1  # weight of the newest in the running average of the cosine
OPEN_STEPS = 300  # that a run is taken to have, at least, where its end is not known
TINY = 1e-24  # added to squares: what is below counts as 0
SMALLEST_SHARE = 1e-4  # of the step's square that the step before must have to be told from rounding
SMALL = 1 << 16  # elements of vectors that are copied to be multiplied with each other
PART = 1 << 12  # elements of longer ones that are added up at once
MEASURED = ("cos(g, step before)", "log signal to noise")
FEATURES = (
    "1",
    "t/T",
    "exp(-10 t/T)",
    MEASURED[0],
    "cos(g, step before) of all tensors",
    MEASURED[1],
    "log growth",
)
STATE_KEYS = ("gain", "agreement", "measured")


class Seen(NamedTuple):
    """What the controller is told of n tensors.

    Attributes:
        scale, rms: root mean squares of the initial and the present values, `[*batch, n]`.
        share: of all elements, `[n]`.
        clock: `[*batch, 1 or n]`.
    """

    scale: Tensor
    rms: Tensor
    share: Tensor
    clock: Clock


class StepController(nn.Module):
    """`exp(clamp(step + z, -4, 3 + max(z, 0)))`, `z <- clamp(z + 0.5 rate / (10 + T/10), -3, 3)`, z starting at 0, with
    `step, rate = A f + C tanh(B f)`.

    B is random and stays as it is; A and C are learned. Where they are 0, all factors are 1. Features are feedback
    alone: what a tensor is (its shape, its place, how many there are) is the prior's to know, as learned from small
    networks it would not carry over to large ones.

    Args:
        init_std: standard deviation of A and C before training.
        seed: of B, and of these.
    """

    hidden: Tensor
    scales: Tensor

    def __init__(self, init_std: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        count, generator = len(FEATURES), make_generator(seed)
        hidden = torch.randn(HIDDEN, count, generator=generator, dtype=torch.float32) / sqrt(count)
        self.direct = nn.Parameter(init_std * torch.randn(OUTPUTS, count, generator=generator, dtype=torch.float32))
        self.readout = nn.Parameter(init_std * torch.randn(OUTPUTS, HIDDEN, generator=generator, dtype=torch.float32))
        self.register_buffer("hidden", hidden)
        self.register_buffer("scales", torch.tensor(OUTPUT_SCALES, dtype=torch.float32), persistent=False)

    def start(self, batch: Sequence[int], like: Tensor) -> Accumulators:
        """A tensor's row before the first step, `[*batch, ...]`."""
        sizes = {"gain": 1, "agreement": 1, "measured": len(MEASURED)}
        return {key: like.new_zeros(*batch, size) for key, size in sizes.items()}

    def forward(self, state: Accumulators, seen: Seen) -> tuple[Accumulators, Tensor]:
        """New rows, and the factor on every tensor's step, `[*batch, n]`.

        Args:
            state: rows `[*batch, n, ...]`, with what was `measure`d in the last step.
        """
        planned = plan_steps(seen.clock, seen.scale.dtype)
        weight = (1 / (seen.clock.step.to(seen.scale.dtype) + 1)).clamp(min=AVERAGE)
        agreement = torch.lerp(state["agreement"][..., 0], state["measured"][..., 0], weight)
        x = self._describe(agreement, state["measured"][..., 1], seen, planned)
        out = x @ self.direct.mT + torch.tanh(x @ self.hidden.mT) @ self.readout.mT
        step, rate = (out * self.scales).unbind(-1)
        gain = state["gain"][..., 0]
        gain = (gain + RATE * rate / (10 + SHARE * planned)).clamp(-GAIN_RANGE, GAIN_RANGE)
        rows = {"gain": gain[..., None], "agreement": agreement[..., None]}
        lowest, highest = STEP_RANGE
        return state | rows, (step + gain).clamp(min=lowest).minimum(highest + gain.clamp(min=0)).exp()

    def _describe(self, agreement: Tensor, signal: Tensor, seen: Seen, planned: Tensor) -> Tensor:
        """The features of every tensor, `[*batch, n, F]`, all of order 1."""
        like = seen.scale
        progress = (seen.clock.count_steps().to(like.dtype) / planned).clamp(max=1)
        growth = ((seen.rms + TINY) / (seen.scale + TINY)).log()
        parts = [
            torch.ones_like(like),
            2 * progress - 1,
            (-10 * progress).exp(),
            3 * agreement,
            3 * (agreement * seen.share).sum(-1, keepdim=True),
            signal,
            growth.clamp(-2, 4) / 2,
        ]
        return torch.stack([part.expand_as(like) for part in parts], -1)


def multiply_step(g: Tensor, m: Tensor, root: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a tensor's step for `measure_step`, `[*batch, 5]`, and the norm of u, `[*batch]`.

    Args:
        g, m: gradient and new momentum in the bases of the step, `[*batch, rows, columns]`.
        root: of the second moment, above 0.
        u: what is made of both, over root: the step before it is brought to its size.
    """
    m, a, u, root = (x.flatten(-2) for x in (m, g / root, u, root))
    if u.numel() <= SMALL:
        # All products at once: of vectors that stay in the cache, a copy costs less than a call for each product.
        rows = torch.stack([u, a, m, root], -2)
        gram = rows @ rows.mT
        products = torch.cat([gram[..., :2, 0], gram.diagonal(dim1=-2, dim2=-1)[..., 1:]], -1)
    else:
        products = torch.stack([_dot(u, u), _dot(a, u), _dot(a, a), _dot(m, m), _dot(root, root)], -1)
    return products, products[..., 0].sqrt()


def measure_step(products: Tensor, kept: float, unbias: tuple[Tensor, Tensor]) -> Tensor:
    """What the controller hears of a step, `[..., 2]` in the order of `MEASURED`.

    Args:
        products: what `multiply_step` made, `[..., 5]`.
        kept: share that the old momentum has in the step, that of the gradient being the rest.
        unbias: 1 less the decays' powers, of momentum and second moment; they broadcast against `[...]`.
    """
    uu, au, aa, mm, power = products.unbind(-1)
    # The step by the momentum before this gradient is what is left of u without it, up to `kept`, which cancels in the
    # end.
    share = 1 - kept
    along = torch.sub(au, aa, alpha=share)
    square = torch.sub(uu, au + along, alpha=share).clamp(min=0)
    # What is left of the subtraction is rounding where there was no momentum before.
    known = square > SMALLEST_SHARE * kept**2 * uu
    cosine = along * (square + TINY).rsqrt() * (aa + TINY).rsqrt()
    noise = (mm / unbias[0].square() + TINY) / (power / unbias[1] + TINY)
    return torch.stack([torch.where(known, cosine.clamp(-1, 1), 0.0), noise.log().clamp(-8, 2) / 4 + 0.75], -1)


def describe_shapes(layouts: Sequence[Layout], counts: Sequence[int], like: Tensor) -> Tensor:
    """What of n tensors does not change: `[n, 4]`, whether each is a vector, its share of all elements, the root mean
    square that torch's layers begin such matrices with (1 / sqrt(3 columns), of a uniform distribution), and whether it
    may be the gains of a normalisation: one dimension of more than one element.

    Args:
        layouts, counts: of groups of equal tensors.
        like: gives dtype and device.
    """
    total = sum(count * prod(layout.shape) for layout, count in zip(layouts, counts, strict=True))

    def describe(layout: Layout) -> tuple[float, float, float, float]:
        size, columns = prod(layout.shape), max(1, prod(layout.shape[1:]))
        gains = size > 1 and len(layout.shape) == 1
        return float(not layout.is_matrix), size / max(1, total), (3 * columns) ** -0.5, float(gains)

    rows = [(describe(layout), count) for layout, count in zip(layouts, counts, strict=True)]
    if like.device.type == "cpu":
        return like.new_tensor([row for row, count in rows for _ in range(count)])
    # Filled where the state is, so that no copy makes the host wait for a device.
    return torch.cat([torch.stack([like.new_full((count,), x) for x in row], -1) for row, count in rows])


def plan_steps(clock: Clock, dtype: torch.dtype) -> Tensor:
    """The run's number of steps, `[*batch, 1 or n]`; where no end is known, what makes it half over, at least 300."""
    guess = (2 * clock.count_steps().to(dtype)).clamp(min=OPEN_STEPS)
    return guess if clock.num_steps is None else torch.where(clock.num_steps > 0, clock.num_steps.to(dtype), guess)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """`[..., n], [..., n] -> [...]`, without their product in memory; in parts, as rounding adds up in one long sum."""
    whole = a.shape[-1] // PART * PART
    parts = [x[..., :whole].reshape(*x.shape[:-1], -1, PART) for x in (a, b)]
    rest = [x[..., whole:] for x in (a, b)]
    pieces = [(x[..., None, :] @ y[..., None])[..., 0, 0] for x, y in (parts, rest)]
    return pieces[0].sum(-1) + pieces[1]
