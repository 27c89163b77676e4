"""Probes: what a rule does, measured from outside, through `init_state` and `update` alone.

A probed entry is given a sequence of gradients, and the steps that the rule takes are noted. After every step the
parameter is put back, so that a step depends on the gradients alone and not on where earlier ones have led.

The steps of an elementwise rule are those of its entries, held at 0. Other rules look at whole tensors, so an entry
alone would say nothing: there the probed entries are the diagonal of SIDE x SIDE matrices, one in each row and column,
and their neighbours have gradients of pure noise, as large as the probed ones, and values +-NEIGHBOUR. Curves are
separate tasks: they share nothing. "Step" is what is subtracted: positive where a positive gradient is followed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.rules import RULES, Rule

SCALES = (1e-3, 1e-1, 1e1)
"""Gradients that the probes are repeated at."""
PLANNED = 1000
"""Steps of the run that a probed rule is told to be in."""
SIDE, NEIGHBOUR = 16, 0.1
HISTORY = 10
"""Steps before the one that is looked at."""
REACH = 3.0
"""Largest gradient of a map, in units of its scale."""
PHASES = (40, 60, 60)
"""Steps of a jump: noise, a constant gradient, its opposite."""
RATIOS = torch.logspace(-1.5, 1.5, 13, dtype=torch.float32)
"""Signal to noise of the gradients in a portrait."""
SIZES = torch.logspace(-4, 2, 37, dtype=torch.float32)
DRAWS = 64
LOSSES = ("falling", "flat", "rising")
PASTS = ("the same gradient before", "alternating signs before", "the opposite gradient before", "first step of all")


class Map(NamedTuple):
    """What `probe_map` measures: the step for every pair of a past and a present gradient.

    Attributes:
        axis: the gradients `[resolution]`, in units of the scale.
        scales: that the probe was repeated at.
        steps: `[scales, past, present]`, positive where a positive gradient is followed.
    """

    axis: Tensor
    scales: tuple[float, ...]
    steps: Tensor


class Jump(NamedTuple):
    """What `probe_jump` measures: steps while the gradient jumps, for several draws of the noise before.

    Attributes:
        scales: that the probe was repeated at.
        gradients: `[scales, draws, time]`, in units of the scale.
        steps: likewise, in units of the parameter.
    """

    scales: tuple[float, ...]
    gradients: Tensor
    steps: Tensor


class Noise(NamedTuple):
    """What `probe_noise` measures: statistics of the steps at several signal-to-noise ratios of the gradient.

    Attributes:
        scales: root mean square of the gradients that the probe was repeated at.
        ratios: of the constant to the noise's standard deviation, `[ratios]`.
        mean, std: of the steps, `[scales, ratios]`.
    """

    scales: tuple[float, ...]
    ratios: Tensor
    mean: Tensor
    std: Tensor


class Schedule(NamedTuple):
    """What `probe_schedule` measures: steps of a whole run under constant gradients.

    Attributes:
        scales: the gradients.
        losses: how the training loss goes, some of `LOSSES`.
        steps: `[losses, scales, time]`.
    """

    scales: tuple[float, ...]
    losses: tuple[str, ...]
    steps: Tensor


class Portrait(NamedTuple):
    """What the pictures of a rule are drawn from: its probes, with Adam's beside them for comparison.

    Attributes:
        label: names the rule.
        elementwise: each element was probed alone; otherwise a whole tensor, as the head of this file says.
        clocked: the rule reads how much of the planned run is done.
        horizon: length of the runs that it was trained on, or None.
        adam, adam_noise: the reference, with a learning rate of 1.
    """

    label: str
    elementwise: bool
    clocked: bool
    horizon: int | None
    gradient: dict[str, Tensor]
    map: Map
    jump: Jump
    adam: Jump
    noise: Noise
    adam_noise: Noise
    schedule: Schedule


def probe_rule(rule: Rule, label: str, horizon: int | None = None) -> Portrait:
    """Run all probes of a rule, and Adam's; a second or a few on a CPU.

    Args:
        label: what the pictures call the rule.
        horizon: length of the runs that it was trained on, from its card; None if that is not known.
    """
    adam = RULES["adam"](lr=1.0)
    return Portrait(
        label,
        rule.elementwise,
        rule.has_schedule,
        horizon,
        probe_gradient(rule, SIZES),
        probe_map(rule, resolution=61),
        probe_jump(rule, draws=DRAWS),
        probe_jump(adam, draws=DRAWS),
        probe_noise(rule, RATIOS, draws=DRAWS),
        probe_noise(adam, RATIOS, draws=DRAWS),
        probe_schedule(rule),
    )


# -- probes ------------------------------------------------------------------------------------------------------------


def probe_gradient(rule: Rule, sizes: Tensor) -> dict[str, Tensor]:
    """The step at gradients of many sizes, after each of the `PASTS`, to see how steps grow with gradients.

    Args:
        sizes: the gradients `[n]`, positive.
    Returns:
        Steps `[n]` for each past, by its name.
    """
    signs = torch.ones(3, HISTORY + 1, dtype=torch.float32)
    signs[1, :HISTORY] = 1 - 2.0 * (torch.arange(HISTORY) % 2)
    signs[2, :HISTORY] = -1
    signals = (signs[..., None] * sizes).movedim(1, 0)  # [time, pasts, n]
    steps = _follow(rule, signals.flatten(1), sizes.repeat(3))[-1].reshape(3, -1)
    return dict(zip(PASTS, [*steps, _follow(rule, sizes[None], sizes)[0]], strict=True))


def probe_map(rule: Rule, scales: tuple[float, ...] = SCALES, resolution: int = 41, arrangements: int = 8) -> Map:
    """The step at every pair of a present gradient and a steady past one.

    Of a rule that is not elementwise, all pairs are the entries of one matrix `[resolution, resolution]` in an
    arbitrary order; the steps are means over `arrangements` of them.

    Args:
        scales: of the gradients, each a map of its own.
        resolution: gradients from -REACH to REACH times the scale.
    """
    axis = torch.linspace(-REACH, REACH, resolution, dtype=torch.float32)
    past, present = (x.flatten() for x in torch.meshgrid(axis, axis, indexing="ij"))
    signal = (
        torch.stack([*[past] * HISTORY, present])[:, None] * torch.tensor(scales, dtype=torch.float32)[:, None]
    )  # [time, scales, pairs]
    shape = (len(scales), resolution, resolution)
    if rule.elementwise:
        return Map(axis, scales, respond(rule, signal, torch.zeros_like(signal[0]))[-1].reshape(shape))
    generator, total = make_generator(0), torch.zeros(len(scales), resolution**2, dtype=torch.float32)
    for i in range(arrangements):
        if i % 2 == 0:  # each order twice, with opposite values, so that the values favour no direction
            order = torch.randperm(resolution**2, generator=generator)
            values = _draw_values(shape, generator)
        steps = respond(rule, signal[..., order].reshape(-1, *shape), values if i % 2 else -values)[-1]
        total[:, order] += steps.flatten(1) / arrangements
    return Map(axis, scales, total.reshape(shape))


def probe_jump(rule: Rule, scales: tuple[float, ...] = SCALES, draws: int = 2 * SIDE) -> Jump:
    """Steps while the gradient is noise of standard deviation 1, then 1, then -1, each times the scale, for the times
    in `PHASES`: how a rule answers to a change.

    Args:
        scales: each a probe of its own.
        draws: of the noise, the same for all scales; a multiple of SIDE.
    """
    noise = torch.randn(PHASES[0], draws, generator=make_generator(1), dtype=torch.float32)
    levels = torch.tensor([1.0] * PHASES[1] + [-1.0] * PHASES[2], dtype=torch.float32)
    gradients = torch.cat([noise, levels[:, None].expand(-1, draws)])  # [time, draws]
    sizes = torch.tensor(scales, dtype=torch.float32)
    steps = measure(rule, gradients[:, None] * sizes[:, None], sizes)
    shown = gradients.T.expand(len(scales), -1, -1)
    return Jump(scales, shown, steps.movedim(0, -1))


def probe_noise(
    rule: Rule, ratios: Tensor, scales: tuple[float, ...] = SCALES, draws: int = 2 * SIDE, num_steps: int = 120
) -> Noise:
    """Steps when the gradient is a constant plus noise, the constant `ratio` times the noise's standard deviation.

    The root mean square of the gradient is the scale, whatever the ratio. Statistics are over draws and over the second
    half of `num_steps`.
    """
    noise = torch.randn(num_steps, 1, 1, draws, generator=make_generator(2), dtype=torch.float32)
    signal = (ratios[:, None] + noise) / (1 + ratios.square()).sqrt()[:, None]  # [time, 1, ratios, draws]
    sizes = torch.tensor(scales, dtype=torch.float32)[:, None].expand(-1, len(ratios))
    steps = measure(rule, (signal * sizes[..., None]).flatten(1, 2), sizes.flatten())[num_steps // 2 :]
    mean, std = steps.mean((0, -1)), steps.var(-1).mean(0).sqrt()
    return Noise(scales, ratios, mean.reshape(sizes.shape), std.reshape(sizes.shape))


def probe_schedule(rule: Rule, num_steps: int = PLANNED, scales: tuple[float, ...] = SCALES) -> Schedule:
    """Steps of a run whose gradient is always the scale: what schedule of the step size a rule follows by itself.

    Args:
        num_steps: of the run, which rules that ask for it are told.
        scales: each a run of its own; for rules that read the training loss, under each of `LOSSES`.
    """
    losses = LOSSES if rule.needs_loss else LOSSES[:1]
    sizes = torch.tensor(scales * len(losses), dtype=torch.float32)
    readings = torch.stack([make_loss(kind, num_steps) for kind in losses], -1).repeat_interleave(len(scales), -1)
    steps = _follow(rule, sizes.expand(num_steps, -1), sizes, readings, num_steps)
    return Schedule(scales, losses, steps.T.reshape(len(losses), len(scales), num_steps))


def make_loss(kind: str, num_steps: int) -> Tensor:
    """A training loss to tell a rule that reads it.

    Args:
        kind: one of `LOSSES`: falling from 2.3 to about 0.2 as losses do, flat at 2.3, or the fall reversed.
    Returns:
        `[num_steps]`.
    """
    falling = 0.15 + 2.15 * torch.exp(-4 * torch.linspace(0, 1, num_steps, dtype=torch.float32))
    return {"falling": falling, "flat": torch.full((num_steps,), 2.3, dtype=torch.float32), "rising": falling.flip(0)}[
        kind
    ]


# -- how steps are taken -----------------------------------------------------------------------------------------------


def measure(
    rule: Rule, signals: Tensor, sizes: Tensor, losses: Tensor | None = None, num_steps: int = PLANNED
) -> Tensor:
    """The steps of probed entries: alone for elementwise rules, among neighbours for those that look at whole tensors.

    Args:
        signals: their gradients `[time, curves, draws]`; draws are a multiple of SIDE.
        sizes: standard deviation `[curves]` of the neighbours' gradients, where there are neighbours.
        losses: training losses `[time, curves]`; by default falling.
        num_steps: planned length of the run.
    Returns:
        Steps `[time, curves, draws]`.
    """
    if rule.elementwise:
        return respond(rule, signals, torch.zeros_like(signals[0]), losses, num_steps)
    time, curves, draws = signals.shape
    repeats, generator = draws // SIDE, make_generator(3)
    values = _draw_values((repeats, SIDE, SIDE), generator)
    values.diagonal(dim1=-2, dim2=-1).zero_()
    noise = torch.randn(
        time, 1, repeats, SIDE, SIDE, generator=generator, dtype=torch.float32
    )  # the same for all curves
    gradients = (noise * sizes[:, None, None, None]).flatten(1, 2)
    gradients.diagonal(dim1=-2, dim2=-1).copy_(signals.reshape(time, -1, SIDE))
    values = values.repeat(curves, 1, 1)
    losses = None if losses is None else losses.repeat_interleave(repeats, -1)
    steps = respond(rule, gradients, values, losses, num_steps)
    return steps.diagonal(dim1=-2, dim2=-1).reshape(signals.shape)


@torch.no_grad()
def respond(
    rule: Rule, gradients: Tensor, values: Tensor, losses: Tensor | None = None, num_steps: int = PLANNED
) -> Tensor:
    """The steps of `rule` on a sequence of gradients, parameters held at `values`.

    Args:
        gradients: `[time, tasks, *shape]`; every task has one tensor, named "weight".
        values: `[tasks, *shape]`.
        losses: training losses `[time, tasks]`; by default falling.
        num_steps: planned length of the run.
    Returns:
        `values` minus the new parameters, like `gradients`.
    """
    params = {"weight": values}
    state, taken = rule.init_state(params, batch_ndim=1), []
    planned = torch.full_like(state.step, num_steps)
    if losses is None:
        losses = make_loss("falling", num_steps)[: len(gradients), None].expand(-1, len(values))
    for g, loss in zip(gradients, losses, strict=True):
        new, state = rule.update({"weight": g}, params, state, loss, planned)
        taken.append(values - new["weight"])
    return torch.stack(taken)


def _follow(
    rule: Rule, signals: Tensor, sizes: Tensor, losses: Tensor | None = None, num_steps: int = PLANNED
) -> Tensor:
    """Steps `[time, curves]` for gradients `[time, curves]`: of one entry, or means over SIDE with neighbours."""
    draws = 1 if rule.elementwise else SIDE
    return measure(rule, signals[..., None].expand(-1, -1, draws), sizes, losses, num_steps).mean(-1)


def _draw_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """+-NEIGHBOUR."""
    return NEIGHBOUR * (2.0 * torch.randint(2, shape, generator=generator) - 1)
