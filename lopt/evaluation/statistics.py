"""What is computed from the runs of one setting: averages over tasks, ratios paired by task with bootstrap intervals,
and how many steps faster one optimizer is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isfinite, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean
from torch import Tensor

RESAMPLES = 4000
EXTREME = 1e3
"""Ratios count as this at most: a run that diverged has no other."""
SMOOTHING = 20
"""A curve is averaged over its last 1/20 before steps are counted, against the noise of mini-batches."""


@dataclass(frozen=True)
class Summary:
    """One figure over seeds. Where a run is not finite a mean would hide it, so there is none; the median survives
    those runs.

    Attributes:
        mean: None where a run is not finite.
        stderr: standard error of the mean; None also for a single run.
        median: None where half of the runs are not finite.
    """

    mean: float | None
    stderr: float | None
    median: float | None


@dataclass(frozen=True)
class Ratio:
    """The mean of some runs over the mean of others on the same seeds; below 1 is better.

    Attributes:
        low, high: 95 % interval by the paired bootstrap over seeds (percentiles); None for a single seed.
        wins: share of seeds on which the first has the lower value; ties count half.
    """

    value: float | None
    low: float | None
    high: float | None
    wins: float


def summarize(values: Sequence[float | None]) -> Summary:
    """One figure over the seeds of a run.

    Args:
        values: per seed; None stands for a run that is not finite, which ranks last in the median.
    Returns:
        Mean, standard error (of the sample, n - 1) and median.
    """
    x = _as_tensor(values)
    median = keep_finite(x.sort().values[[(len(x) - 1) // 2, len(x) // 2]].mean())
    if not bool(x.isfinite().all()):
        return Summary(None, None, median)
    stderr = float(x.std()) / sqrt(len(x)) if len(x) > 1 else None
    return Summary(float(x.mean()), stderr, median)


def compare_paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Ratio:
    """The ratio of two means over the same seeds, with an interval that knows that hard tasks are hard for both.

    The bootstrap draws seeds, not losses.

    Args:
        ours, theirs: per seed, in the same order; None stands for a run that is not finite.
    """
    a, b = _as_tensor(ours), _as_tensor(theirs)
    wins = float(((a < b).double() + 0.5 * (a == b).double()).mean())
    value = keep_finite(a.mean() / b.mean())
    if value is None or len(a) == 1 or float(b.mean()) == 0:
        return Ratio(value, None, None, wins)
    low, high = find_interval((a.numpy(), b.numpy()), lambda x, y, axis: x.mean(axis) / y.mean(axis), paired=True)
    return Ratio(value, keep_finite(float(low)), keep_finite(float(high)), wins)


def find_interval(
    samples: tuple[NDArray[np.float64], ...], statistic: Callable[..., Any], *, paired: bool = False
) -> tuple[Any, Any]:
    """A 95 % interval by the bootstrap (scipy's, percentiles), from a fixed generator: equal data give equal intervals.

    Args:
        samples: `[n, ...]`, n > 1; drawn along their first axis.
        statistic: of the samples, with the argument `axis`.
        paired: the samples are drawn together.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a run that is not finite makes draws that are not
        options: dict[str, Any] = {"method": "percentile", "paired": paired, "vectorized": True, "axis": 0, "rng": 0}
        found = bootstrap(samples, statistic, n_resamples=RESAMPLES, **options)
    low, high = found.confidence_interval
    return low, high


def compute_speedup(curve: Tensor, reference: Tensor) -> float | None:
    """Steps that `reference` needs over steps that `curve` needs for the same loss; above 1 is faster.

    The loss is where the worse of the two ends, so that both reach it; the worse needs all its steps. Both curves
    `[N + 1]` are smoothed (`SMOOTHING`). None if one of them is not finite.
    """
    if not bool(curve.isfinite().all() & reference.isfinite().all()):
        return None
    num_steps = len(curve) - 1
    width = max(1, num_steps // SMOOTHING)
    ours, theirs = (c.double().unfold(0, width, 1).mean(-1) for c in (curve, reference))

    def count_steps(smooth: Tensor, loss: Tensor) -> int:
        return max(1, int((smooth <= loss).nonzero()[0]) + width - 1)

    if ours[-1] <= theirs[-1]:
        return num_steps / count_steps(ours, theirs[-1])
    return count_steps(theirs, ours[-1]) / num_steps


def average_middle(ratios: Sequence[float]) -> float:
    """The interquartile mean of ratios, on the log scale: a quarter of them is left out at each end (scipy's
    `trim_mean`), so that no task outweighs all others.

    Args:
        ratios: positive; those beyond `EXTREME` or its inverse, infinite ones included, count as that.
    """
    return exp(float(trim_mean(_take_logs(ratios), 0.25)))


def average_middle_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The interquartile mean with its 95 % interval by the bootstrap over tasks (percentiles), equal for equal data.

    Returns:
        Mean, low and high; for fewer than two ratios all three are the mean.
    """
    mean = average_middle(ratios)
    if len(ratios) < 2:
        return mean, mean, mean
    low, high = find_interval((_take_logs(ratios),), lambda x, axis: trim_mean(x, 0.25, axis=axis))
    return mean, exp(float(low)), exp(float(high))


def _take_logs(ratios: Sequence[float]) -> NDArray[np.float64]:
    return np.log(np.clip(np.asarray(ratios, dtype=np.float64), 1 / EXTREME, EXTREME))


def keep_finite(value: float | Tensor) -> float | None:
    """The number, or None if it is infinite or NaN: what goes into results, whose JSON has no other way to say that a
    run diverged.
    """
    return float(value) if isfinite(value) else None


def _as_tensor(values: Sequence[float | None]) -> Tensor:
    infinity = float("inf")
    return torch.tensor([infinity if v is None else v for v in values], dtype=torch.float64)
