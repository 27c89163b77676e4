"""Speed of meta-training: inner updates (a step of one task each) per second, with their backward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_map

from bench import setting
from bench.timing import synchronize
from lopt.estimators import ESTIMATORS
from lopt.rules import RULES
from lopt.tasks import TASKS
from lopt.unroll import InnerLoop

WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "eager, update checkpointed": {"checkpoint": "update"},
    "compiled": {"compile": True},
    "compiled, update checkpointed": {"compile": True, "checkpoint": "update"},
}


def measure(
    rule: str, task: str, tasks: int, steps: int, repeats: int, options: dict[str, Any], device: torch.device
) -> dict[str, float]:
    """Time `repeats` estimates of a truncated window after a warm-up.

    Returns:
        `first_seconds` (the first estimate, with compilation), median and quartiles of inner updates per second of wall
        clock, `parameter_updates_per_second` (each inner update moves all parameters of its task), and on the CPU
        median and quartiles of inner updates per CPU-second.
    """
    loop = InnerLoop(RULES[rule]().to(device), TASKS[task](), seed=0)
    estimator = ESTIMATORS["truncated"](num_steps=steps, **options)
    slots = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, estimator.start(loop, torch.arange(tasks)))
    begin = time.perf_counter()
    slots = estimator.estimate(loop, slots).carry
    synchronize(device)
    first = time.perf_counter() - begin
    slots = estimator.estimate(loop, slots).carry
    synchronize(device)
    per_cpu, per_wall = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        slots = estimator.estimate(loop, slots).carry
        synchronize(device)
        per_wall.append(tasks * steps / (time.perf_counter() - wall))
        per_cpu.append(tasks * steps / (time.process_time() - cpu))
    result = {"first_seconds": first, **name_quartiles("per_second", per_wall)}
    result["parameter_updates_per_second"] = result["per_second"] * count_parameters(loop)
    return result | (name_quartiles("per_cpu_second", per_cpu) if device.type == "cpu" else {})


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
    return columns | {
        "per second": lambda r: f"{r['per_second']:.0f}",
        "quartiles": lambda r: write_quartiles(r, "per_second"),
        "parameters per second": lambda r: f"{r['parameter_updates_per_second']:.3g}",
        "against the first": lambda r: f"{r[key] / base[key]:.2f} x",
        "first call, s": lambda r: f"{r['first_seconds']:.1f}",
    }


def make_table(results: dict[str, dict[str, float]]) -> Table:
    """One row per way."""
    columns = list_columns(next(iter(results.values())))
    table = setting.start_table("inner updates (one task each, forward and backward)", ["way", *columns])
    for way, result in results.items():
        table.add_row(way, *(write(result) for write in columns.values()))
    return table


@click.command()
@click.option("--rule", default="lstm", show_default=True, type=click.Choice(sorted(RULES)))
@click.option("--task", default="mlp", show_default=True, type=click.Choice(sorted(set(TASKS) - {"module"})))
@click.option("--tasks", default=16, show_default=True, help="Slots, T.")
@click.option("--steps", default=20, show_default=True, help="Steps of a window, K.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=2))
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--device", "where", default="cpu", show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only these; repeatable.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def meta(
    rule: str,
    task: str,
    tasks: int,
    steps: int,
    repeats: int,
    threads: int,
    where: str,
    ways: tuple[str, ...],
    file: Path | None,
) -> None:
    """Inner updates per second of truncated backpropagation, eager and compiled."""
    torch.set_num_threads(threads)
    device = torch.device(where)
    results = {}
    for way in ways or WAYS:
        try:
            results[way] = measure(rule, task, tasks, steps, repeats, WAYS[way], device)
        except (RuntimeError, NotImplementedError) as error:
            if device.type == "cpu":
                raise
            raise click.ClickException(
                f"meta-training does not run on {device}: {setting.write_error(error)}"
            ) from error
    told = {
        "rule": RULES[rule]().describe(),
        "task": TASKS[task]().describe(),
        "tasks": tasks,
        "steps": steps,
        "repeats": repeats,
        "threads": threads,
        "dtype": "float32",
        "device": setting.describe_device(device),
    } | setting.list_versions()
    console = setting.make_console()
    console.print(", ".join(f"{key} {value}" for key, value in told.items()), highlight=False, markup=False)
    console.print(make_table(results))
    setting.write_json(file, {"setting": told, "results": results})
