"""Bias and variance of every estimator of the meta-gradient, on a smooth problem whose meta-gradient is known.

An estimate is the meta-gradient of T tasks in one window of K steps of their runs. Its mean is over all phases of
training (a whole run, after another one of burn-in), over tasks, and over repeats with seeds of their own. Bias and
variance are in units of the true gradient, which second-order backpropagation through whole runs of many tasks gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.tradeoff import draw_tradeoff
from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS, Estimator
from lopt.meta.estimators.full import Full
from lopt.meta.estimators.full_es import FullES
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, Rule
from lopt.tasks import TaskFamily
from lopt.tasks.base import Batch, Task

OBJECTIVES = ("log", "mean", "sum")
REFERENCE_SEED = -1
"""Of the tasks of the reference; repeats have the seeds 0, 1, ..."""
CHUNK = 1024


class Bowl(TaskFamily):
    """`0.5 sum h x^2` with curvatures h log-spaced from 10^-1.5 to 1; tasks differ in where x starts, N(0, 1)."""

    name = "bowl"

    def __init__(self, dim: int = 10) -> None:
        self.dim, self.curvature = dim, torch.logspace(-1.5, 0, dim, dtype=torch.float32)

    def init(self, task: Task, generator: torch.Generator) -> Params:
        """x `[dim]`."""
        return {"x": torch.randn(self.dim, generator=generator, dtype=torch.float32)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """The curvatures: the loss is exact."""
        return {"h": self.curvature.expand(len(seeds), -1)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 0.5 * (batch["h"] * params["x"].square()).sum()


GRADIENTS = tuple(name for name, estimator in ESTIMATORS.items() if not estimator.needs_init)
"""Those that estimate the gradient of a meta-loss."""


class Variant(NamedTuple):
    """An entry of `ESTIMATORS` with options.

    Attributes:
        whole: an estimate takes whole runs instead of windows.
        in_step: all tasks are at the same step of their runs.
    """

    name: str
    options: dict[str, Any]

    @property
    def whole(self) -> bool:
        return issubclass(ESTIMATORS[self.name], Full | FullES)

    @property
    def in_step(self) -> bool:
        return self.whole or not getattr(ESTIMATORS[self.name], "staggered", True)

    @property
    def label(self) -> str:
        """Backpropagation with its order."""
        return f"{self.name}, order {self.options['order']}" if "order" in self.options else self.name

    def build(self, steps: int) -> Estimator:
        """With windows of `steps` steps."""
        return ESTIMATORS[self.name](num_steps=steps, **self.options)


class Reference(NamedTuple):
    """The true meta-gradient `[W]`, its standard error, and how far smoothing by sigma moves it `[W]`; all float64."""

    gradient: Tensor
    error: float
    shift: Tensor


# -- what is measured --------------------------------------------------------------------------------------------------


def list_variants(names: tuple[str, ...], objective: str, sigma: float) -> list[Variant]:
    """Backpropagation of first and of second order, evolution strategies once."""
    found = []
    for name in names:
        knows = ESTIMATORS[name].__init__.__annotations__
        options: dict[str, Any] = {"objective": objective} | ({"sigma": sigma} if "sigma" in knows else {})
        for extra in [{"order": 1}, {"order": 2}] if "order" in knows else [{}]:
            found.append(Variant(name, options | extra))
    return found


def make_loop(rule: Rule, horizon: int, seed: int) -> InnerLoop:
    """Runs of `horizon` steps of the smooth problem."""
    return InnerLoop(rule, Bowl(), seed, lambda seeds: torch.full_like(seeds, horizon))


def flatten(gradient: Params) -> Tensor:
    """`[W]` float64."""
    return torch.cat([g.flatten() for g in gradient.values()]).double()


def find_reference(rule: Rule, horizon: int, objective: str, tasks: int, sigma: float) -> Reference:
    """The gradient by second-order backpropagation through `tasks` whole runs, at the rule and smoothed around it."""
    full, loop = Full(num_steps=horizon, order=2, objective=objective), make_loop(rule, horizon, REFERENCE_SEED)
    gradients = []
    for ids in torch.arange(tasks).split(max(1, min(CHUNK, tasks // 4))):
        gradients.append(flatten(full.estimate(loop, full.start(loop, ids)).gradient))
    values = torch.stack(gradients)
    # Smoothed: the same tasks at the nodes of a quadrature that is exact for polynomials of degree 5.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    ids, shift = torch.arange(min(tasks, CHUNK)), torch.zeros_like(values[0])
    carry = full.start(loop, ids)
    here = flatten(full.estimate(loop, carry).gradient)
    for points in product(zip(nodes, weights / weights.sum(), strict=True), repeat=len(here)):
        moved = move_rule(rule, sigma * torch.tensor([x for x, _ in points], dtype=torch.float32))
        there = full.estimate(replace(loop, rule=moved), carry).gradient
        shift += math.prod(w for _, w in points) * (flatten(there) - here)
    return Reference(values.mean(0), find_error(values), shift)


def move_rule(rule: Rule, offsets: Tensor) -> Rule:
    """A copy of the rule with `offsets` `[W]` added to its meta-weights."""
    moved = RULES[rule.name](**rule.config)
    with torch.no_grad():
        for w, offset in zip(moved.meta_weights().values(), offsets, strict=True):
            w += offset
    return moved


def find_error(values: Tensor) -> float:
    """Standard error of the mean of independent vectors `[n, W]`, as a length."""
    return float((values.var(0).sum() / len(values)).sqrt())


def measure(rule: Rule, variant: Variant, horizon: int, steps: int, tasks: int, repeats: int) -> dict[str, Any]:
    """Estimates over one whole run, after another one of burn-in, for every seed.

    Returns:
        `gradients` `[repeats, windows, W]` float64, `inner_steps` of one estimate, `cpu_seconds` per inner step.
    """
    windows = 1 if variant.whole else horizon // steps
    gradients, inner, seconds = [], 0.0, 0.0
    for repeat in range(repeats):
        loop, estimator = make_loop(rule, horizon, repeat), variant.build(steps)
        carry, row = estimator.start(loop, torch.arange(tasks)), []
        for window in range(windows if variant.whole else 2 * windows):
            begin = time.process_time()
            estimate = estimator.estimate(loop, carry)
            carry = estimate.carry
            if variant.whole or window >= windows:
                row.append(flatten(estimate.gradient))
                inner += estimate.metrics["inner_steps"]
                seconds += time.process_time() - begin
        gradients.append(torch.stack(row))
    return {
        "gradients": torch.stack(gradients),
        "inner_steps": inner / (repeats * windows),
        "cpu_seconds": seconds / inner,
    }


def summarize(found: dict[str, Any], reference: Reference, in_step: bool) -> dict[str, Any]:
    """Bias and variance, all relative to the true gradient; see `LEGEND`."""
    values: Tensor = found["gradients"]
    inner, windows = found["inner_steps"], values.shape[1]
    size, runs = float(reference.gradient.norm()), values.mean(1)
    mean, error = runs.mean(0), math.hypot(find_error(runs), reference.error)
    away = mean - reference.gradient
    noise, whole = float(values.var(0).sum(-1).mean()), float(runs.var(0).sum())
    length = float(mean.norm()) / size
    swing = None
    if in_step and windows > 1:  # the mean of a window over repeats has some of the noise, too
        swing = math.sqrt(max(0.0, float(values.mean(0).var(0).sum()) - noise / len(values))) / size
    return {
        "bias": float(away.norm()) / size,
        "bias_error": error / size,
        "bias_is_noise": float(away.norm()) < 2 * error,
        "bias_smoothed": float((away - reference.shift).norm()) / size,
        "cosine": float(torch.nn.functional.cosine_similarity(mean, reference.gradient, 0)),
        "length": length,
        "variance": noise * inner / size**2,
        "variance_own": noise * inner / (size * length) ** 2,
        "variance_run": whole * inner * windows / size**2,
        "swing": swing,
        "inner_steps": inner,
        "cpu_microseconds": 1e6 * found["cpu_seconds"],
    }


# -- the command -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "bias": "bias",
    "bias_error": "+-",
    "bias_smoothed": "to smoothed",
    "cosine": "cosine",
    "length": "length",
    "variance": "variance x steps",
    "variance_own": "to own length",
    "variance_run": "of a run",
    "swing": "swing",
    "cpu_microseconds": "us per step",
}
LEGEND = """\
bias, +-         |mean - true| and its standard error; "=" where it is below two standard errors
to smoothed      the same to the gradient that is smoothed by sigma over whole runs
cosine, length   of the mean to the true gradient
variance x steps variance of one estimate x its inner steps: the steps after which noise is as long as the true gradient
to own length    as long as the mean of the estimates
of a run         of the mean over all windows of a run x the steps of all: more where windows of a run are alike
swing            standard deviation between the windows of a run where tasks are in step: more tasks do not lower it"""


def make_table(results: list[dict[str, Any]]) -> Table:
    """One row per estimator and window."""
    table = setting.start_table("in units of the true meta-gradient", ["estimator", "K", *COLUMNS.values()])
    for r in results:
        figures = [setting.write_figure(r[key]) for key in COLUMNS]
        figures[0] = ("= " if r["bias_is_noise"] else "") + figures[0]
        table.add_row(r["estimator"], str(r["steps"]), *figures)
    return table


def measure_all(
    rule: Rule,
    variants: list[Variant],
    horizon: int,
    windows: tuple[int, ...],
    tasks: int,
    repeats: int,
    truth: Reference,
) -> Iterator[dict[str, Any]]:
    """What `summarize` says of every variant and window."""
    for variant in variants:
        for steps in (horizon,) if variant.whole else windows:
            found = measure(rule, variant, horizon, steps, tasks, repeats)
            entry = {"estimator": variant.label, "whole_runs": variant.whole, "steps": steps}
            yield entry | summarize(found, truth, variant.in_step)


@click.command()
@click.option(
    "--estimator", "names", multiple=True, type=click.Choice(sorted(GRADIENTS)), help="Only these; repeatable."
)
@click.option("--horizon", default=100, show_default=True, type=click.IntRange(min=1), help="Steps of a run.")
@click.option("--window", "windows", default=(2, 5, 10, 20, 50, 100), show_default=True, multiple=True, help="K.")
@click.option("--objective", default="log", show_default=True, type=click.Choice(OBJECTIVES))
@click.option("--momentum", default=0.7, show_default=True, help="Of the rule: momentum with rate 0.1, decay 0.01.")
@click.option("--sigma", default=0.01, show_default=True, help="Standard deviation of perturbations.")
@click.option("--tasks", default=128, show_default=True, type=click.IntRange(min=1), help="Tasks or pairs, T.")
@click.option("--repeats", default=40, show_default=True, type=click.IntRange(min=2), help="Seeds.")
@click.option("--reference-tasks", default=65536, show_default=True, type=click.IntRange(min=8))
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw bias and variance here (PNG).")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def estimators(
    names: tuple[str, ...],
    horizon: int,
    windows: tuple[int, ...],
    objective: str,
    momentum: float,
    sigma: float,
    tasks: int,
    repeats: int,
    reference_tasks: int,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Bias and variance of the estimators of the meta-gradient, against the length of the window.

    The problem: quadratic bowls of 10 dimensions, optimised by momentum, whose rate, momentum and weight decay are the
    meta-weights.
    """
    wrong = [steps for steps in windows if steps < 1 or horizon % steps]
    if wrong:
        raise click.UsageError(f"--window must divide --horizon {horizon}, got {', '.join(map(str, wrong))}")
    torch.set_num_threads(threads)
    rule = RULES["momentum"](lr=0.1, momentum=momentum, weight_decay=0.01)
    truth = find_reference(rule, horizon, objective, reference_tasks, sigma)
    size = float(truth.gradient.norm())
    measured = {"rule": rule.describe(), "task": Bowl().describe(), "objective": objective, "horizon": horizon}
    measured |= {"sigma": sigma, "tasks": tasks, "repeats": repeats, "reference_tasks": reference_tasks}
    measured |= {"dtype": "float32", "device": setting.describe_device(torch.device("cpu")), "threads": threads}
    measured |= setting.list_versions()
    reference = {
        "gradient": dict(zip(rule.meta_weights(), truth.gradient.tolist(), strict=True)),
        "error": truth.error / size,
        "smoothing": float(truth.shift.norm()) / size,
    }
    console = setting.make_console()
    console.print(", ".join(f"{key} {value}" for key, value in measured.items()), highlight=False, markup=False)
    gradient = ", ".join(f"{key} {value:.4g}" for key, value in reference["gradient"].items())
    console.print(
        f"true meta-gradient: {gradient}; in units of its length: its standard error {reference['error']:.2g}, "
        f"smoothing by sigma moves it by {reference['smoothing']:.2g}",
        highlight=False,
    )
    results = []
    variants = list_variants(names or GRADIENTS, objective, sigma)
    for result in measure_all(rule, variants, horizon, windows, tasks, repeats, truth):
        results.append(result)
        console.print(f"{result['estimator']}, K = {result['steps']}: bias {result['bias']:.3g}", highlight=False)
    console.print(make_table(results))
    console.print(LEGEND, highlight=False, markup=False)
    setting.write_json(file, {"setting": measured, "reference": reference, "results": results})
    if picture is not None:
        picture.write_bytes(draw_tradeoff(results, reference["smoothing"], horizon))
