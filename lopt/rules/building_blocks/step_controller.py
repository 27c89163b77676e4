"""How large a step each tensor takes: a learned integrator of the step's logarithm, told what the last steps did.

A rule that normalises its direction leaves one number per tensor to be decided. Feedback on it is in how the next
gradient agrees with the last step, in the gradient's signal to noise, and in the loss. The first is the hypergradient
of Baydin et al. 2018, arXiv 1703.04782, as a cosine.
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
STEP_RANGE = (-4.0, 3.0)  # of the logarithm of all that is decided
GAIN_RANGE = 3.0  # of the integrator, either way
RATE = 0.5
SHARE = 0.1  # of a run in which the integrator may go from 0 to `RATE` times an output of 1
AVERAGE = 0.1  # weight of the newest in the running averages
FAST = 0.2  # the same for the loss whose trend is seen
OPEN_STEPS = 300  # that a run is taken to have, at least, where its end is not known
LARGEST = 1e12  # of gradients along a step
SMALLEST_LOSS = 1e-12  # that shares are taken of
TINY = 1e-24  # added to squares: what is below counts as 0
SMALLEST_SHARE = 1e-4  # of the step's square that the step before must have to be told from rounding
SMALL = 1 << 16  # elements of vectors that are copied to be multiplied with each other
PART = 1 << 12  # elements of longer ones that are added up at once
AVERAGED = ("cos(g, step before)", "share of the loss that a step takes")
MEASURED = (AVERAGED[0], "log signal to noise", "g . step before")
FEATURES = (
    "1",
    "t/T",
    "exp(-10 t/T)",
    *AVERAGED,
    "cos(g, step before) of all tensors",
    MEASURED[1],
    "log growth",
    "trend of the loss",
    "log(loss/first loss)",
)
STATE_KEYS = ("gain", "averages", "measured", "loss_mean")


class Seen(NamedTuple):
    """What the controller is told of n tensors.

    Attributes:
        scale, rms: root mean squares of the initial and the present values, `[*batch, n]`.
        size: of the step before the controller's factor, `[*batch, n]`.
        share: of all elements, `[n]`.
        loss: `[*batch, 1 or n]`, or None.
        clock: `[*batch, 1 or n]`.
    """

    scale: Tensor
    rms: Tensor
    size: Tensor
    share: Tensor
    loss: Tensor | None
    clock: Clock


class StepController(nn.Module):
    """`exp(clamp(step + z))`, `z <- clamp(z + 0.5 rate / (10 + T/10))`, with `step, rate = A f + C tanh(B f)`.

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
        sizes = {"gain": 1, "averages": len(AVERAGED), "measured": len(MEASURED), "loss_mean": 3}
        return {key: like.new_zeros(*batch, size) for key, size in sizes.items()}

    def forward(self, state: Accumulators, seen: Seen) -> tuple[Accumulators, Tensor]:
        """New rows, and the factor on every tensor's step, `[*batch, n]`.

        Args:
            state: rows `[*batch, n, ...]`, with what was `measure`d in the last step.
        """
        planned = plan_steps(seen.clock, seen.scale.dtype)
        state = self._average(state, seen, planned)
        x = self._describe(state, seen, planned)
        out = x @ self.direct.mT + torch.tanh(x @ self.hidden.mT) @ self.readout.mT
        step, rate = (out * self.scales).unbind(-1)
        gain = state["gain"][..., 0]
        gain = (gain + RATE * rate / (10 + SHARE * planned)).clamp(-GAIN_RANGE, GAIN_RANGE)
        return state | {"gain": gain[..., None]}, (step + gain).clamp(*STEP_RANGE).exp()

    def _average(self, state: Accumulators, seen: Seen, planned: Tensor) -> Accumulators:
        """The rows with the last step's measurements and the present loss in them."""
        steps = seen.clock.step.to(seen.size.dtype)
        losses = update_losses(state["loss_mean"], seen.loss, steps, planned)
        cosine, _, descent = state["measured"].unbind(-1)
        # How much of the loss the steps of all tensors take together, as their gradients say.
        level = losses[..., 0].abs()
        taken = (seen.size * descent.clamp(-LARGEST, LARGEST)).sum(-1, keepdim=True) / (level + SMALLEST_LOSS)
        taken = taken.sign() * (100 * taken.abs()).log1p() / 3
        weight = (1 / (steps + 1)).clamp(min=AVERAGE)[..., None]
        new = torch.stack([cosine, torch.where(level > 0, taken, 0.0).clamp(-4, 4)], -1)
        return {**state, "averages": torch.lerp(state["averages"], new, weight), "loss_mean": losses}

    def _describe(self, state: Accumulators, seen: Seen, planned: Tensor) -> Tensor:
        """The features of every tensor, `[*batch, n, F]`, all of order 1."""
        like = seen.scale
        progress = (seen.clock.now.to(like.dtype) / planned).clamp(max=1)
        fast, slow, first = state["loss_mean"].unbind(-1)
        cosine, taken = state["averages"].unbind(-1)
        parts = [
            torch.ones_like(like),
            2 * progress - 1,
            (-10 * progress).exp(),
            3 * cosine,
            taken,
            3 * (cosine * seen.share).sum(-1, keepdim=True),
            state["measured"][..., 1],
            _log_ratio(seen.rms, seen.scale).clamp(-2, 4) / 2,
            _compare(fast, slow).clamp(-2, 2),
            _compare(fast, first, 1e-4).clamp(-9, 3) / 4,
        ]
        return torch.stack([part.expand_as(like) for part in parts], -1)


def update_losses(losses: Tensor, loss: Tensor | None, steps: Tensor, planned: Tensor) -> Tensor:
    """A fast and a slow average of the loss, and the first one, `[*batch, n, 3]`; 0 before there is any.

    Args:
        losses: before `loss` `[*batch, 1 or n]`; where that is None or not finite, they stay.
        steps, planned: of the run, which the slow average is a share of.
    """
    if loss is None:
        return losses
    loss = loss.to(losses.dtype).expand(losses.shape[:-1])
    fast, slow, first = losses.unbind(-1)
    begins = (losses == 0).all(-1)
    slowly = 1 / torch.minimum(steps + 1, 5 + 0.2 * planned)
    new = torch.stack(
        [
            torch.where(begins, loss, fast + (loss - fast) * FAST),
            torch.where(begins, loss, slow + (loss - slow) * slowly),
            torch.where(begins, loss, first),
        ],
        -1,
    )
    return torch.where(new.isfinite().all(-1, keepdim=True), new, losses)


def multiply_step(g: Tensor, m: Tensor, root: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a tensor's step for `measure_step`, `[*batch, 9]`, and the norm of u, `[*batch]`.

    Args:
        g, m: gradient and new momentum in the bases of the step, `[*batch, rows, columns]`.
        root: of the second moment, above 0.
        u: what is made of both, over root: the step before it is brought to its size.
    """
    g, m, a, u, root = (x.flatten(-2) for x in (g, m, g / root, u, root))
    if u.numel() <= SMALL:
        # All products at once: of vectors that stay in the cache, a copy costs less than a call for each product.
        rows = torch.stack([u, a, g, m, root], -2)
        gram = rows @ rows.mT
        sums = [gram[..., :3, :2].flatten(-2), gram.diagonal(dim1=-2, dim2=-1)[..., 3:]]
    else:
        au = _dot(a, u)
        sums = [torch.stack([_dot(u, u), au, au, _dot(a, a), _dot(g, u), _dot(g, a), _dot(m, m), _dot(root, root)], -1)]
    products = torch.cat([*sums, torch.full_like(sums[0][..., :1], root.shape[-1])], -1)
    return products, products[..., 0].sqrt()


def measure_step(products: Tensor, kept: float, unbias: tuple[Tensor, Tensor]) -> Tensor:
    """What the controller hears of a step, `[..., 3]` in the order of `MEASURED`.

    Args:
        products: what `multiply_step` made, `[..., 9]`.
        kept: share that the old momentum has in the step, that of the gradient being the rest.
        unbias: 1 less the decays' powers, of momentum and second moment; they broadcast against `[...]`.
    """
    uu, au, _, aa, gu, ga, mm, power, count = products.unbind(-1)
    # The step by the momentum before this gradient is what is left of u without it, up to `kept`, which cancels in the
    # end.
    share = 1 - kept
    along, descent = torch.sub(au, aa, alpha=share), torch.sub(gu, ga, alpha=share)
    square = torch.sub(uu, au + along, alpha=share).clamp(min=0)
    # What is left of the subtraction is rounding where there was no momentum before.
    known = square > SMALLEST_SHARE * kept**2 * uu
    inverse = (square + TINY).rsqrt()
    noise = (mm / unbias[0].square() + TINY) / (power / unbias[1] + TINY)
    measured = [
        torch.where(known, (along * inverse * (aa + TINY).rsqrt()).clamp(-1, 1), 0.0),
        noise.log().clamp(-8, 2) / 4 + 0.75,
        torch.where(known, descent * inverse * count.sqrt(), 0.0),
    ]
    return torch.stack(measured, -1)


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
    guess = (2 * clock.now.to(dtype)).clamp(min=OPEN_STEPS)
    return guess if clock.num_steps is None else torch.where(clock.num_steps > 0, clock.num_steps.to(dtype), guess)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """`[..., n], [..., n] -> [...]`, without their product in memory; in parts, as rounding adds up in one long sum."""
    whole = a.shape[-1] // PART * PART
    parts = [x[..., :whole].reshape(*x.shape[:-1], -1, PART) for x in (a, b)]
    rest = [x[..., whole:] for x in (a, b)]
    pieces = [(x[..., None, :] @ y[..., None])[..., 0, 0] for x, y in (parts, rest)]
    return pieces[0].sum(-1) + pieces[1]


def _compare(loss: Tensor, other: Tensor, floor: float = 0.0) -> Tensor:
    """The logarithm of a ratio of losses; where they are not above 0, how far the one is above the other."""
    positive = (loss > 0) & (other > 0)
    ratio = _log_ratio(loss.clamp(min=0), other.clamp(min=0), floor)
    return torch.where(positive, ratio, (loss - other) / (other.abs() + SMALLEST_LOSS))


def _log_ratio(above: Tensor, below: Tensor, floor: float = 0.0) -> Tensor:
    return ((above + TINY) / (below + TINY) + floor).log()
