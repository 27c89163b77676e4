"""Does meta-training slow down or grow? One truncated estimate after the other for many minutes."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import click
import torch

from lopt.estimators import ESTIMATORS
from lopt.rules import RULES
from lopt.tasks import TASKS
from lopt.unroll import InnerLoop


def read_resident_mb() -> float:
    """Resident memory of this process now, in MB; the peak where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--tasks", default=16, show_default=True, help="Slots, T.")
@click.option("--steps", default=20, show_default=True, help="Steps of a window, K.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end.")
def soak(minutes: float, tasks: int, steps: int, threads: int, as_json: bool) -> None:
    """Meta-train the LSTM on digit tasks; print speed per CPU-second and resident memory every minute."""
    torch.set_num_threads(threads)
    rule = RULES["lstm"]()
    loop = InnerLoop(rule, TASKS["mlp"](), seed=0)
    estimator = ESTIMATORS["truncated"](num_steps=steps)
    outer = torch.optim.AdamW(rule.parameters(), lr=1e-3)
    slots = estimator.start(loop, torch.arange(tasks))
    begin, rows, count = time.monotonic(), [], 0
    while time.monotonic() - begin < minutes * 60:
        minute_end, cpu, done = begin + 60 * (len(rows) + 1), time.process_time(), 0
        while time.monotonic() < minute_end:
            estimate = estimator.estimate(loop, slots)
            slots = estimate.carry
            for name, weight in rule.named_parameters():
                weight.grad = estimate.gradient[name]
            outer.step()
            done += 1
        count += done
        speed = done * tasks * steps / (time.process_time() - cpu)
        rows.append({"minute": len(rows) + 1, "per_cpu_second": speed, "resident_mb": read_resident_mb()})
        if not as_json:
            row = rows[-1]
            click.echo(f"minute {row['minute']:>3}  {speed:7.1f} inner steps/CPU-s  {row['resident_mb']:8.1f} MB")
    fifth = max(1, len(rows) // 5)

    def average(part: list[dict[str, float]], key: str) -> float:
        return sum(row[key] for row in part) / len(part)

    change = {
        key: average(rows[-fifth:], key) / average(rows[:fifth], key) for key in ("per_cpu_second", "resident_mb")
    }
    if as_json:
        click.echo(json.dumps({"outer_steps": count, "rows": rows, "last_fifth_over_first": change}, indent=2))
    else:
        text = ", ".join(f"{key} {value:.3f}" for key, value in change.items())
        click.echo(f"{count} outer steps; last fifth over first fifth: {text}")
