"""Speed of meta-training: inner steps (of one task each) per CPU-second, with their backward pass."""

from __future__ import annotations

import json
import platform
import statistics
import time
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import lopt
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


def measure(rule: str, task: str, tasks: int, steps: int, repeats: int, options: dict[str, Any]) -> dict[str, float]:
    """Time `repeats` estimates of a truncated window after a warm-up.

    Returns:
        `first_seconds` (the first estimate, with compilation), median and quartiles of inner steps per CPU-second
        and of inner steps per second of wall clock.
    """
    loop = InnerLoop(RULES[rule](), TASKS[task](), seed=0)
    estimator = ESTIMATORS["truncated"](num_steps=steps, **options)
    slots = estimator.start(loop, tasks)
    begin = time.perf_counter()
    slots = estimator.estimate(loop, slots).slots
    first = time.perf_counter() - begin
    slots = estimator.estimate(loop, slots).slots
    per_cpu, per_wall = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        slots = estimator.estimate(loop, slots).slots
        per_wall.append(tasks * steps / (time.perf_counter() - wall))
        per_cpu.append(tasks * steps / (time.process_time() - cpu))
    low, median, high = statistics.quantiles(per_cpu, n=4)
    return {
        "first_seconds": first,
        "per_cpu_second": median,
        "per_cpu_second_low": low,
        "per_cpu_second_high": high,
        "per_second": statistics.median(per_wall),
    }


@click.command()
@click.option("--rule", default="lstm", show_default=True, type=click.Choice(sorted(RULES)))
@click.option("--task", default="mlp", show_default=True, type=click.Choice(sorted(set(TASKS) - {"module"})))
@click.option("--tasks", default=16, show_default=True, help="Slots, T.")
@click.option("--steps", default=20, show_default=True, help="Steps of a window, K.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=2))
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only these; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def meta(
    rule: str, task: str, tasks: int, steps: int, repeats: int, threads: int, ways: tuple[str, ...], as_json: bool
) -> None:
    """Inner steps per CPU-second of truncated backpropagation, eager and compiled."""
    torch.set_num_threads(threads)
    chosen = ways or tuple(WAYS)
    results = {way: measure(rule, task, tasks, steps, repeats, WAYS[way]) for way in chosen}
    setting = {
        "rule": RULES[rule]().describe(),
        "task": TASKS[task]().describe(),
        "tasks": tasks,
        "steps": steps,
        "repeats": repeats,
        "threads": threads,
        "dtype": "float32",
        "lopt": lopt.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} {platform.processor() or platform.system()}",
    }
    if as_json:
        click.echo(json.dumps({"setting": setting, "results": results}, indent=2))
        return
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in setting.items()), highlight=False)
    table = Table(title="inner steps (one task each, forward and backward)", title_justify="left")
    for column in ("way", "per CPU-second", "quartiles", "per second", "against the first", "first call, s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    base = results[chosen[0]]["per_cpu_second"]
    for way, r in results.items():
        quartiles = f"{r['per_cpu_second_low']:.0f} - {r['per_cpu_second_high']:.0f}"
        ratio = f"{r['per_cpu_second'] / base:.2f} x"
        table.add_row(
            way, f"{r['per_cpu_second']:.0f}", quartiles, f"{r['per_second']:.0f}", ratio, f"{r['first_seconds']:.1f}"
        )
    console.print(table)
