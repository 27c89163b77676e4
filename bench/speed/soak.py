"""Does meta-training slow down or grow? A run of many outer steps, with all that the trainer does."""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from bench import setting
from bench.speed.meta import list_sections
from lopt.meta.config.build import build
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.trainer.trainer import Progress, Trainer
from lopt.rules import RULES
from lopt.tasks import TASKS


def read_resident_mb() -> float:
    """Resident memory of this process now, in MB; the peak where /proc is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE / 2**20
    except OSError:
        import resource  # of POSIX alone

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.option("--rule", default="small_fc", show_default=True, type=click.Choice(sorted(RULES)))
@click.option("--task", default="quadratic", show_default=True, type=click.Choice(sorted(set(TASKS) - {"module"})))
@click.option("--estimator", default="pes", show_default=True, type=click.Choice(sorted(ESTIMATORS)))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as rule.hidden=4; repeatable.")
@click.option("--tasks", default=4, show_default=True, help="Slots or pairs, T.")
@click.option("--steps", default=5, show_default=True, help="Steps of a window, K.")
@click.option("--outer-steps", default=10_000, show_default=True, type=click.IntRange(min=20))
@click.option("--points", default=20, show_default=True, type=click.IntRange(min=4), help="How often to look.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def soak(
    rule: str,
    task: str,
    estimator: str,
    overrides: tuple[str, ...],
    tasks: int,
    steps: int,
    outer_steps: int,
    points: int,
    threads: int,
    file: Path | None,
) -> None:
    """Meta-train for many outer steps, with validations, logs and checkpoints; print speed and memory as it goes."""
    sections = list_sections(rule, task, estimator, steps, overrides)
    every = max(1, outer_steps // points)
    config = TrainerConfig(
        steps=outer_steps, tasks=tasks, threads=threads, validate_every=every, checkpoint_every=every
    )
    rows: list[dict[str, float]] = []
    count, last = 0.0, time.process_time()

    def look(progress: Progress) -> None:
        nonlocal count, last
        count += progress.metrics.get("inner_steps", 0.0)
        if progress.step == 0 or progress.step % every:
            return
        now = time.process_time()
        rows.append({"step": progress.step, "per_cpu_second": count / (now - last), "resident_mb": read_resident_mb()})
        row, count, last = rows[-1], 0.0, now
        click.echo(
            f"outer step {row['step']:>6}  {row['per_cpu_second']:7.0f} inner updates/CPU-s  "
            f"{row['resident_mb']:8.1f} MB"
        )

    with tempfile.TemporaryDirectory() as folder:
        made = build("estimator", ESTIMATORS, sections["estimator"])
        family = build("task", TASKS, sections["task"])
        Trainer(build("rule", RULES, sections["rule"]), family, made, config, folder=folder).run(look)
    change = compare_ends(rows)
    click.echo(", ".join(f"{key}: last quarter over second {value:.3f}" for key, value in change.items()))
    told: dict[str, Any] = sections | {"tasks": tasks, "threads": threads, "outer_steps": outer_steps}
    told |= {"device": setting.describe_device(torch.device("cpu"))} | setting.list_versions()
    setting.write_json(file, {"setting": told, "rows": rows, "change": change})


def compare_ends(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the last quarter of the points, relative to the second one: the first one warms up."""
    quarter = len(rows) // 4
    return {
        key: statistics.median(row[key] for row in rows[-quarter:])
        / statistics.median(row[key] for row in rows[quarter : 2 * quarter])
        for key in ("per_cpu_second", "resident_mb")
    }
