"""Prequential losses on streams: rules that nobody tunes beside optimizers that are tuned in hindsight.

A loss is that of the next example, before it is learned from. On tracking there is also the time that it takes to
recover from a flip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from lopt.evaluation.statistics import summarize
from lopt.evaluation.streams.pictures import draw_tracking
from lopt.evaluation.streams.prequential import GRIDS, Course, find_recovery, tune_in_hindsight
from lopt.evaluation.streams.rainfall import Rainfall
from lopt.meta.trainer.trainer import RULE
from lopt.rules.files import load
from lopt.tasks import TASKS, TaskFamily

STREAMS: dict[str, tuple[Callable[[], TaskFamily], int, int]] = {
    "tracking": (TASKS["tracking"], 10_000, 5_000),
    "random_walk": (TASKS["random_walk"], 2000, 0),
    "rotating": (TASKS["rotating"], 2000, 0),
    "permuted_digits": (TASKS["permuted_digits"], 2000, 0),
    "rainfall": (Rainfall, 18_159, 0),
    "rainfall, logistic": (lambda: Rainfall(width=0), 18_159, 0),
}
"""Each with its steps, and those of them that are burn-in."""

TRACKING = "tracking"


def list_rules(runs: tuple[str, ...]) -> dict[str, Any]:
    """Rules by the name of their run folder or file, or by their shipped name."""
    rules = {}
    for run in runs:
        path = Path(run)
        rules[path.stem] = load(path / RULE if path.is_dir() else run)
    if len(rules) < len(runs):
        raise click.UsageError("the folders or files of RUNS must have different names, as rows of the table do")
    return rules


def judge(course: Course, losses: Tensor, period: int | None) -> dict[str, Any]:
    """Mean loss with half of its 95 % interval over streams, and steps of recovery where there are flips."""
    summary = summarize(course.average(losses).tolist())
    row: dict[str, Any] = {"loss": summary.mean, "interval": 1.96 * (summary.stderr or 0.0)}
    if period is not None:
        row["recovery"] = float(find_recovery(losses, period, course.burn_in))
    return row


def make_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A row per rule, a column per stream."""
    table = setting.start_table("prequential loss; recovery in examples", ["", *results])
    for label in dict.fromkeys(label for rows in results.values() for label in rows):
        table.add_row(label, *(_write(rows.get(label)) for rows in results.values()))
    return table


def _write(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["loss"] is None:
        return "not finite"
    text = f"{row['loss']:.4f} \u00b1 {row['interval']:.4f}"
    if "recovery" in row:
        text += f"; {row['recovery']:.1f}"
    if row.get("setting"):
        text += " (" + ", ".join(f"{key} {value:.3g}" for key, value in row["setting"].items()) + ")"
    return text + (" edge" if row.get("edges") else "")


@click.command()
@click.argument("runs", nargs=-1)
@click.option("--stream", "names", type=click.Choice(list(STREAMS)), multiple=True, help="Repeatable; all by default.")
@click.option("--seeds", default=50, show_default=True, type=click.IntRange(min=2), help="Streams of each kind.")
@click.option("--steps", type=click.IntRange(min=2), help="Of each stream, half of them burn-in on tracking.")
@click.option("--without-baselines", is_flag=True, help="Rules only.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw tracking here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def streams(
    runs: tuple[str, ...],
    names: tuple[str, ...],
    seeds: int,
    steps: int | None,
    without_baselines: bool,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge rules on streams that drift, by the loss of the next example.

    RUNS are run folders, rule files or shipped names. Baselines are tuned in hindsight, on the streams themselves.
    """
    torch.set_num_threads(threads)
    console, rules = setting.make_console(), list_rules(runs)
    results: dict[str, dict[str, Any]] = {}
    for name in names or STREAMS:
        make, num_steps, burn_in = STREAMS[name]
        try:
            family = make()
        except ImportError as error:
            click.echo(f"{name} is left out: {error}")
            continue
        if steps is not None:
            num_steps, burn_in = steps, (steps // 2 if burn_in else 0)
        period = getattr(family, "pace", None) if name == TRACKING else None
        course = Course(family, num_steps, burn_in // (period or 1) * (period or 1), seeds)
        curves = {label: course.run(rule) for label, rule in rules.items()}
        rows = {label: judge(course, losses, period) for label, losses in curves.items()}
        for baseline in () if without_baselines else GRIDS:
            found = tune_in_hindsight(baseline, course)
            curves[baseline] = found.losses
            rows[baseline] = judge(course, found.losses, period) | {"setting": found.setting, "edges": found.edges}
        if picture is not None and period is not None:
            picture.write_bytes(draw_tracking(curves, period, course.burn_in))
        results[name] = rows
        setting.write_json(file, {"seeds": seeds, "results": results, "versions": setting.list_versions()})
    if results:
        console.print(make_table(results))
