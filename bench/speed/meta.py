"""Speed of meta-training: inner updates (a step of one task each) per second, with all that an estimate takes."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from bench import setting
from bench.meter import PARTS, MeteredLoop
from bench.timing import synchronize
from lopt.meta.config.build import build
from lopt.meta.config.overrides import apply_changes, parse_override
from lopt.meta.estimators import ESTIMATORS, Estimator
from lopt.meta.estimators.evolution import Evolution
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.on_gpu import NOT_CAPTURED, PopulationStride, choose_stride
from lopt.rules import RULES, Rule
from lopt.tasks import TASKS, TaskFamily

WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "eager, update checkpointed": {"checkpoint": "update"},
    "compiled": {"compile": True},
    "compiled, update checkpointed": {"compile": True, "checkpoint": "update"},
}

STRIDES = ("kernels", "captured", "kernels, captured")
"""Ways of evolution strategies on a GPU: the rule's update by kernels, the whole step in a CUDA graph."""


def list_sections(
    rule: str, task: str, estimator: str, steps: int, overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Names and options of rule, task and estimator, changed by overrides such as rule.hidden=4.

    Raises:
        click.UsageError: an override of something else.
    """
    sections: dict[str, dict[str, Any]] = {
        "rule": {"name": rule},
        "task": {"name": task},
        "estimator": {"name": estimator, "num_steps": steps},
    }
    apply_changes(sections, [parse_override(text) for text in overrides])
    if sorted(sections) != ["estimator", "rule", "task"]:
        raise click.UsageError(f"--set takes rule.*, task.* and estimator.*, got {', '.join(overrides)}")
    return sections


def measure(loop: InnerLoop, estimator: Estimator, tasks: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Time `repeats` estimates after a warm-up, and one more for where the time goes.

    Returns:
        `first_seconds` (the first estimate, with compilation), median and quartiles of inner updates per second of wall
        clock, `parameter_updates_per_second` (each inner update moves all parameters of its task), on the CPU median
        and quartiles of inner updates per CPU-second, and the shares of `bench.meter`, which are those of plain steps.
    """
    carry = estimator.start(loop, torch.arange(tasks, device=device))
    begin = time.perf_counter()
    carry = estimator.estimate(loop, carry).carry
    synchronize(device)
    first = time.perf_counter() - begin
    per_cpu, per_wall = [], []
    for repeat in range(repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        estimate = estimator.estimate(loop, carry)
        synchronize(device)
        steps = estimate.metrics["inner_steps"]
        carry = estimate.carry
        if repeat > 0:  # the second call is a warm-up, too
            per_wall.append(steps / (time.perf_counter() - wall))
            per_cpu.append(steps / (time.process_time() - cpu))
    result = {"first_seconds": first, **name_quartiles("per_second", per_wall)}
    result["parameter_updates_per_second"] = result["per_second"] * count_parameters(loop)
    if device.type == "cpu":
        result |= name_quartiles("per_cpu_second", per_cpu)
    metered = MeteredLoop(**{f.name: getattr(loop, f.name) for f in fields(loop)} | {"stride": None})
    plain = copy(estimator)
    if isinstance(plain, Evolution):
        plain.stride = None
    plain.estimate(metered, carry)
    metered.meter.seconds |= dict.fromkeys(PARTS, 0.0)  # that was a warm-up
    begin = time.perf_counter()
    plain.estimate(metered, carry)
    return result | {f"share of {key}": x for key, x in metered.meter.shares(time.perf_counter() - begin).items()}


def make_strides(rule: Rule, family: TaskFamily, device: torch.device) -> dict[str, PopulationStride]:
    """Those of `STRIDES` that there are for a rule on a device."""
    best = choose_stride(rule, family, device, capture=True)
    if best is None:
        return {}
    made = {"captured": PopulationStride(kernels=False, capture=best.capture)}
    if best.kernels:
        made = {"kernels": PopulationStride(kernels=True), **made, "kernels, captured": best}
    return made


def list_ways(estimator: str, strides: Collection[str]) -> dict[str, dict[str, Any]]:
    """The ways in which an estimator can be measured, with its options; all on the way of `strides` are eager."""
    knows = set(ESTIMATORS[estimator].__init__.__annotations__)
    ways = {way: options for way, options in WAYS.items() if set(options) <= knows}
    return ways | {way: {} for way in strides if issubclass(ESTIMATORS[estimator], Evolution)}


def count_parameters(loop: InnerLoop) -> int:
    """Of one task."""
    return sum(map(prod, loop.family.spec.shapes))


def name_quartiles(name: str, values: list[float]) -> dict[str, float]:
    """The median under that name, and both quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def list_columns(base: dict[str, float]) -> dict[str, Callable[[dict[str, float]], str]]:
    """Headings and contents; on the CPU, which others may use, too, those per CPU-second come first."""

    def write_quartiles(r: dict[str, float], key: str) -> str:
        return f"{r[f'{key}_low']:.0f} - {r[f'{key}_high']:.0f}"

    key = "per_cpu_second" if "per_cpu_second" in base else "per_second"
    columns: dict[str, Callable[[dict[str, float]], str]] = {}
    if key == "per_cpu_second":
        columns = {
            "per CPU-second": lambda r: f"{r[key]:.0f}",
            "its quartiles": lambda r: write_quartiles(r, key),
        }
    shares = [f"share of {part}" for part in (*PARTS, "estimator")]
    columns["per second"] = lambda r: f"{r['per_second']:.0f}"
    if key == "per_second":
        columns["its quartiles"] = lambda r: write_quartiles(r, "per_second")
    return columns | {
        "parameters/s": lambda r: f"{r['parameter_updates_per_second']:.3g}",
        "to first": lambda r: f"{r[key] / base[key]:.2f} x",
        "first, s": lambda r: f"{r['first_seconds']:.1f}",
        "data, learner, rule, rest": lambda r: ", ".join(f"{r[share]:.0%}" for share in shares),
    }


def make_table(results: dict[str, dict[str, float]]) -> Table:
    """One row per way."""
    columns = list_columns(next(iter(results.values())))
    table = setting.start_table("inner updates (a step of one task each)", ["way", *columns])
    for way, result in results.items():
        table.add_row(way, *(write(result) for write in columns.values()))
    return table


@click.command()
@click.option("--rule", default="lstm", show_default=True, type=click.Choice(sorted(RULES)))
@click.option("--task", default="mlp", show_default=True, type=click.Choice(sorted(set(TASKS) - {"module"})))
@click.option("--estimator", default="truncated", show_default=True, type=click.Choice(sorted(ESTIMATORS)))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as rule.hidden=4; repeatable.")
@click.option("--tasks", default=(16,), show_default=True, multiple=True, help="Slots or pairs, T; repeatable.")
@click.option("--steps", default=20, show_default=True, help="Steps of a window, K.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=2))
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--device", "where", default="cpu", show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice([*WAYS, *STRIDES]), help="Only these; repeatable.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def meta(
    rule: str,
    task: str,
    estimator: str,
    overrides: tuple[str, ...],
    tasks: tuple[int, ...],
    steps: int,
    repeats: int,
    threads: int,
    where: str,
    ways: tuple[str, ...],
    file: Path | None,
) -> None:
    """Inner updates per second of meta-training, the rule eager, compiled and so on, as far as the estimator can.

    On a GPU evolution strategies are measured by the rule's kernels and captured in CUDA graphs, too.
    Both members of a pair count. Other jobs on the machine disturb even the figures per CPU-second.
    """
    torch.set_num_threads(threads)
    device = torch.device(where)
    sections = list_sections(rule, task, estimator, steps, overrides)
    strides = make_strides(build("rule", RULES, sections["rule"]), build("task", TASKS, sections["task"]), device)
    possible = list_ways(estimator, strides)
    results: dict[str, dict[str, float]] = {}
    for way in ways or possible:
        if way not in possible:
            raise click.UsageError(f"--way: {estimator} has no way {way!r}, only {', '.join(possible)}")
        for count in tasks:
            try:
                family = build("task", TASKS, sections["task"]).to(device)
                rule_there = build("rule", RULES, sections["rule"]).to(device)
                stride = make_strides(rule_there, family, device).get(way)
                loop = InnerLoop(rule_there, family, seed=0, stride=stride)
                made = build("estimator", ESTIMATORS, sections["estimator"] | possible[way])
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", message=NOT_CAPTURED)  # plain steps under another name
                    results[f"{way}, {count} tasks"] = measure(loop, made, count, repeats, device)
            except ValueError as error:  # such as a machine without a compiler
                raise click.ClickException(str(error)) from error
            except (RuntimeError, NotImplementedError, UserWarning) as error:
                if device.type == "cpu":
                    raise
                message = f"meta-training does not run on {device}: {setting.write_error(error)}"
                raise click.ClickException(message) from error
    told = {
        "rule": build("rule", RULES, sections["rule"]).describe(),
        "task": build("task", TASKS, sections["task"]).describe(),
        "estimator": ", ".join(f"{key}={value}" for key, value in sections["estimator"].items()),
        "repeats": repeats,
        "threads": threads,
        "dtype": "float32",
        "device": setting.describe_device(device),
    } | setting.list_versions()
    console = setting.make_console()
    console.print(", ".join(f"{key} {value}" for key, value in told.items()), highlight=False, markup=False)
    console.print(make_table(results))
    setting.write_json(file, {"setting": told, "results": results})
