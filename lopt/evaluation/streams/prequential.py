"""Prequential losses of rules on streams, with baselines that are tuned in hindsight.

Source: Dawid 1984, "Present position and potential developments: the prequential approach", JRSS A 147.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, Rule
from lopt.tasks import TaskFamily

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "sgd": {"lr": [2.0**k for k in range(-11, 1)]},
    "rmsprop": {"lr": [2.0**k for k in range(-12, -1)]},
    "adam": {"lr": [2.0**k for k in range(-12, -1)]},
    "idbd": {"lr": [0.0125, 0.05], "meta_rate": [1e-3, 3e-3, 5e-3, 7e-3, 0.01, 0.013, 0.016]},
}
"""What is tried of each baseline. An edge that is best is told in the table."""


class Course(NamedTuple):
    """How long a stream is followed.

    Attributes:
        family: whose losses are prequential, as its batches are new at every step.
        num_steps: examples, or batches, in all; each is predicted, and learned from after that.
        burn_in: of these, which do not count.
        seeds: of the streams.
    """

    family: TaskFamily
    num_steps: int
    burn_in: int
    seeds: int

    def run(self, rule: Rule, **values: Tensor) -> Tensor:
        """Losses `[num_steps, seeds]` of a rule, each before the step that learns from it; `[.., n * seeds]` for n.

        Args:
            values: of n settings for each of some meta-weights, `[n]`.
        """
        count = len(next(iter(values.values()))) if values else 1
        seeds = torch.arange(self.seeds).repeat(count)
        weights = {key: w.detach().expand(len(seeds)) for key, w in rule.named_parameters()} if values else None
        for key, x in values.items():
            assert weights is not None, "there are values"
            weights[key] = x.to(weights[key].dtype).repeat_interleave(self.seeds)
        # The first loss is before any step, so that there is one step less than losses.
        return run_curves(rule, self.family, seeds, self.num_steps - 1, meta_weights=weights).losses

    def average(self, losses: Tensor) -> Tensor:
        """What counts: the mean over the steps behind the burn-in, `[T]`."""
        return losses[self.burn_in :].double().mean(0)


class Hindsight(NamedTuple):
    """A baseline with the setting that was best on the very streams that it is judged on.

    Attributes:
        losses: `[num_steps, seeds]`.
        setting: its options.
        edges: those of them that are at an end of their grid.
    """

    losses: Tensor
    setting: dict[str, float]
    edges: list[str]


def tune_in_hindsight(name: str, course: Course, grid: Mapping[str, Sequence[float]] | None = None) -> Hindsight:
    """The best of a grid by the mean loss over all streams; a setting that fails on one of them is out.

    Args:
        name: of a rule whose options in the grid are meta-weights.
        grid: values by option; that of `GRIDS` by default.
    Raises:
        ValueError: no setting stays finite.
    """
    grid = grid or GRIDS[name]
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    losses = course.run(RULES[name](), **_as_weights(name, settings))
    by_setting = losses.view(len(losses), len(settings), course.seeds).transpose(0, 1)
    means = course.average(losses).view(len(settings), course.seeds).mean(1).nan_to_num(nan=torch.inf)
    best = int(means.argmin())
    if not means[best].isfinite():
        raise ValueError(f"no setting of {name} stays finite on {course.family.describe()}: {grid}")
    found = settings[best]
    edges = [key for key, values in grid.items() if len(values) > 2 and found[key] in (min(values), max(values))]
    return Hindsight(by_setting[best], found, edges)


def _as_weights(name: str, settings: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """The meta-weights that rules with these options have, `[n]` by name."""
    rules = [dict(RULES[name](**setting).named_parameters()) for setting in settings]
    varied = [key for key in rules[0] if len({float(rule[key].detach()) for rule in rules}) > 1]
    return {key: torch.stack([rule[key].detach() for rule in rules]) for key in varied}


def find_recovery(losses: Tensor, period: int, burn_in: int = 0) -> Tensor:
    """Steps from a change until half of the excess loss is gone, in between steps by linear interpolation, `[]`.

    The excess is that over the loss just before the next change. It is measured on the mean over all changes.

    Args:
        losses: `[N, T]`, with a change at every multiple of `period`.
        burn_in: steps that do not count, a multiple of `period`.
    """
    by_phase = average_phases(losses, period, burn_in)
    excess = (by_phase - by_phase[-1]) / (by_phase[0] - by_phase[-1])
    below = int((excess <= 0.5).nonzero()[0])
    above = excess[below - 1]
    return below - 1 + (above - 0.5) / (above - excess[below])


def average_phases(losses: Tensor, period: int, burn_in: int = 0) -> Tensor:
    """Mean loss by the number of steps since the last change, `[period]`, over all changes and streams.

    Args:
        losses, period, burn_in: as in `find_recovery`.
    """
    whole = losses[burn_in : len(losses) // period * period]
    return whole.double().view(-1, period, losses.shape[1]).mean((0, 2))
