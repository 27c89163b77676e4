"""Rules done the naive way: every feature of every element in memory, as the published PyTorch ports have it.

Source: Metz et al. 2022, arXiv 2203.11860 (`small_fc`); arXiv 2602.19142 (`celo2_base`); arXiv 2211.09760 (`velo`).
Written for reading, from the formulas, and sharing nothing with `lopt.rules`: what the rules are timed and tested
against. Features are last, `[*shape, k]`. A scalar is a vector of one element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Layers = list[tuple[Tensor, Tensor]]
"""Weights `[out, in]` and biases `[out]`."""
State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, int, Layers], Tensor]
"""`(p, g, state, steps made so far, layers)` to the new parameter; the state is updated in place."""

DECAYS = (0.9, 0.99, 0.999)
TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
ALL_GROUPS, VECTOR_GROUPS = 14, 9


class NaiveOptimizer:
    """Steps parameters `[*shape]`, which have gradients, in place; the state is fp32."""

    def __init__(self, params: Iterable[Tensor], update: Update, layers: Layers) -> None:
        self.params, self.update = list(params), update
        self.layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
        self.state: dict[Tensor, State] = {p: {} for p in self.params}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters."""
        for p in self.params:
            assert p.grad is not None
            shape = p.shape or (1,)
            new = self.update(
                p.reshape(shape).float(), p.grad.reshape(shape).float(), self.state[p], self.steps, self.layers
            )
            p.copy_(new.reshape(p.shape))
        self.steps += 1


def update_small_fc(p: Tensor, g: Tensor, state: State, steps: int, layers: Layers, step_mult: float = 1e-3) -> Tensor:
    """`p - step_mult d exp(0.001 a)` from 28 normalised features and 11 of time."""
    accumulate(state, g, second_decay=0.999)
    groups = make_features(state, g, p, rs_eps=1e-6, vector_eps=1e-6)
    x = torch.cat(
        [normalize(f, 1e-5, range(p.ndim)) for name, f in groups.items() if name not in ("clip g", "g rs")], -1
    )
    time = torch.tanh(steps / torch.tensor(TIME_SCALES, device=p.device, dtype=torch.float32) - 1)
    x = torch.cat([x, time.expand(*p.shape, -1)], -1)
    y = apply_mlp(x, layers)
    return p - step_mult * y[..., 0] * torch.exp(1e-3 * y[..., 1])


def update_celo2(p: Tensor, g: Tensor, state: State, steps: int, layers: Layers, lr: float = 1.0) -> Tensor:
    """`p - lr u` with u of rms 1 per matrix, not orthogonalised; vectors have 15 of the 30 features."""
    g = g.clamp(-1000, 1000)
    axes = (0, 1) if p.ndim > 1 else (0,)  # in and out, of a convolution, too
    accumulate(state, g, second_decay=0.95)
    groups = list(make_features(state, g, p, rs_eps=1e-8, vector_eps=0.0).values())
    groups = groups[: ALL_GROUPS if p.ndim > 1 else VECTOR_GROUPS]
    x = torch.cat([normalize(f, 1e-9, axes) for f in groups], -1)
    (weight, bias), *rest = layers
    y = apply_mlp(x, [(weight[:, : x.shape[-1]], bias), *rest])
    return p - lr * normalize(y[..., :1], 1e-9, axes)[..., 0]


def update_velo(p: Tensor, g: Tensor, state: State, steps: int, layers: Layers, multiplier: float = 1.0) -> Tensor:
    """`p - 0.001 multiplier d exp(0.001 a) rms(p)`, given what VeLO's LSTM made: the multiplier and the layers."""
    g = g.clamp(-1000, 1000)
    accumulate(state, g, second_decay=0.999)
    groups = make_features(state, g, p, rs_eps=1e-6, vector_eps=0.0)
    y = apply_mlp(torch.cat([normalize(f, 1e-5, range(p.ndim)) for f in groups.values()], -1), layers)
    rms = (p.square().mean() + 1e-9).sqrt()
    return p - 1e-3 * multiplier * y[..., 0] * torch.exp(1e-3 * y[..., 1]) * rms


# -- what the three share ----------------------------------------------------------------------------------------------


def find_factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The largest and the second largest; of equal ones the later in the sources' order (spatial..., in, out)."""
    by_size = sorted([*range(2, len(shape)), 1, 0], key=lambda axis: shape[axis])
    return by_size[-1], by_size[-2]


def accumulate(state: State, g: Tensor, second_decay: float) -> None:
    """Momenta `m`, second moment `v`, and averages of g^2 by row `R` and column `C` (vectors: both the element's)."""
    decays = torch.tensor(DECAYS, device=g.device, dtype=torch.float32)
    square = (g.square() + 1e-30)[..., None]
    rows = cols = square
    if g.ndim > 1:
        larger, smaller = find_factored_axes(tuple(g.shape))
        rows, cols = square.mean(larger, keepdim=True), square.mean(smaller, keepdim=True)
    for key, new, decay in (
        ("m", g[..., None], decays),
        ("v", g.square()[..., None], second_decay),
        ("R", rows, decays),
        ("C", cols, decays),
    ):
        old = state.get(key, torch.zeros_like(new))
        state[key] = decay * old + (1 - decay) * new


def make_features(state: State, g: Tensor, p: Tensor, rs_eps: float, vector_eps: float) -> dict[str, Tensor]:
    """The 14 groups in the sources' order, each `[*shape, k]`."""
    g, p = g[..., None], p[..., None]
    m, v, rows, cols = (state[key] for key in ("m", "v", "R", "C"))
    rs = torch.rsqrt(v + rs_eps)
    if g.ndim > 2:
        smaller = find_factored_axes(tuple(g.shape[:-1]))[1]
        relative = rows / (rows.mean(smaller, keepdim=True) + 1e-9)
        factor = factor_m = relative.clamp(min=1e-9).rsqrt() * cols.clamp(min=1e-9).rsqrt()
    else:
        factor, factor_m = (rows + 1e-9).clamp(min=1e-9).rsqrt(), (rows + vector_eps).rsqrt()
    rows, cols = rows.expand_as(m), cols.expand_as(m)
    return {
        "g": g,
        "clip g": g.clamp(-0.1, 0.1),
        "p": p,
        "m": m,
        "v": v,
        "m rs": m * rs,
        "rs": rs,
        "g F": g * factor,
        "g rs": g * rs,
        "R": rows,
        "C": cols,
        "rsqrt R": (rows + 1e-8).rsqrt(),
        "rsqrt C": (cols + 1e-8).rsqrt(),
        "m F": m * factor_m,
    }


def normalize(x: Tensor, eps: float, axes: Iterable[int]) -> Tensor:
    """`x` over its root mean square along `axes`."""
    return x * torch.rsqrt(eps + x.square().mean(tuple(axes), keepdim=True))


def apply_mlp(x: Tensor, layers: Layers) -> Tensor:
    """ReLU between layers, not after the last."""
    *hidden, last = layers
    for weight, bias in hidden:
        x = F.linear(x, weight, bias).relu()
    return F.linear(x, *last)


UPDATES: dict[str, tuple[Update, tuple[int, ...]]] = {
    "small_fc": (update_small_fc, (39, 32, 2)),
    "celo2_base": (update_celo2, (30, 8, 8, 3)),
    "velo": (update_velo, (30, 4, 4, 3)),
}
"""By the name of the rule: the update and the widths of its MLP."""


def draw_layers(widths: tuple[int, ...], seed: int = 0) -> Layers:
    """Normal weights of std 1/sqrt(fan_in), biases 0."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(out, into, generator=generator, dtype=torch.float32) / into**0.5,
            torch.zeros(out, dtype=torch.float32),
        )
        for into, out in pairwise(widths)
    ]
