"""How good meta-trained rules are on every family that they were trained on, and on others: held-out tasks.

Beside each rule stands the same rule untrained, Adam as it comes (lr 1e-3) and Adam with a tuned learning rate, once
constant and once also with a tuned choice of schedule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from bench import setting
from bench.quality.field import draw_field, read_curve
from lopt.cli.console import ARCHIVE
from lopt.evaluation.baselines import Tuning, tune_baseline
from lopt.evaluation.comparison import DEFAULT_LABEL, compare
from lopt.evaluation.settings import read_card
from lopt.evaluation.statistics import keep_finite
from lopt.meta.config.build import build
from lopt.meta.config.settings import Setting
from lopt.meta.loggers.json_lines import METRICS, read_metrics
from lopt.meta.trainer.trainer import RULE
from lopt.rules import RULES, Rule
from lopt.rules.files import load, load_card
from lopt.tasks import TASKS

CONSTANT, SCHEDULED = "tuned adam, constant", "tuned adam, with schedule"
OTHERS = (DEFAULT_LABEL, CONSTANT, SCHEDULED)
TUNING = Tuning()

Losses = dict[str, list[float | None]]
"""Of every optimizer the final loss of each task, None where it is not finite."""


def measure(rules: Mapping[str, Rule], where: Setting, seeds: int, archive: Path, console: Console) -> Losses:
    """Final losses on held-out tasks, as `lopt.evaluation.comparison.compare` finds them, on the whole train split."""

    def tell(what: str) -> None:
        console.print(f"  {what}", highlight=False)

    tuned = tune_baseline("adam", "constant", where.family, where.num_steps, TUNING, archive, tell)
    constant = RULES["adam"](lr=tuned.best["final"] or 1e-3)
    result = compare(
        {**rules, CONSTANT: constant},
        where.family,
        where.num_steps,
        seeds,
        baselines=("adam",),
        tuning=TUNING,
        archive=archive,
        on_work=tell,
    )
    return {SCHEDULED if e.kind == "tuned" else e.label: e.runs["final"].final for e in result.entries}


def average(losses: list[float | None]) -> float:
    """Over tasks; infinite where one is."""
    return math.inf if None in losses else math.fsum(x for x in losses if x is not None) / len(losses)


def list_rules(files: tuple[Path, ...]) -> tuple[dict[str, Rule], dict[str, dict[str, Any]]]:
    """The rules in the files, each with its untrained self, by label; and by name the tasks that the first had.

    Raises:
        click.ClickException: a file is none of a rule, its card has no configuration, or two rules have one name.
    """
    rules: dict[str, Rule] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for file in files:
        file = file / RULE if file.is_dir() else file
        try:
            rule, card = load(file), read_card(load_card(file))
        except (OSError, ValueError) as error:
            raise click.ClickException(f"{file} cannot be compared: {error}") from error
        if card.config is None:
            raise click.ClickException(f"{file} has no training card that tells its tasks: give a run or its rule file")
        if card.name in rules:
            raise click.ClickException(f"two rules are called {card.name!r}: train one of them with --set name=...")
        rules |= {card.name: rule, f"{card.name}, untrained": card.config.build_rule()}
        tasks = tasks or {source.name: source.task for source in card.config.list_families()}
    return rules, tasks


def summarize(results: Mapping[str, Losses], label: str) -> dict[str, float]:
    """A rule against the others: medians over the families of the ratios of mean losses, and wins over default Adam."""
    means = {where: {name: average(x) for name, x in losses.items()} for where, losses in results.items()}
    ratios = {
        f"to {other}": median(losses[label] / losses[other] for losses in means.values())
        for other in (f"{label}, untrained", *OTHERS)
        if all(other in losses for losses in means.values())
    }
    beaten = sum(losses[label] < losses[DEFAULT_LABEL] for losses in means.values())
    return ratios | {"families better than default": beaten, "families": len(means)}


def make_table(results: Mapping[str, Losses]) -> Table:
    """A row per family and length, a column per optimizer."""
    labels = list(next(iter(results.values())))
    heads = [label.replace(", ", ",\n") for label in labels]
    table = setting.start_table("final loss, mean over held-out tasks", ["family", *heads])
    for where, losses in results.items():
        table.add_row(where, *(f"{average(losses[label]):.4g}" for label in labels))
    return table


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default=(200, 1000), show_default=True, multiple=True, help="Length of the runs; repeatable.")
@click.option("--seeds", default=16, show_default=True, type=click.IntRange(min=2), help="Held-out tasks of a family.")
@click.option(
    "--other", "others", multiple=True, type=click.Choice(sorted(set(TASKS) - {"module"})), help="Also these."
)
@click.option("--archive", type=click.Path(path_type=Path), default=ARCHIVE, show_default=True, help="Tuned baselines.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here (PNG); needs run folders."
)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def families(
    runs: tuple[Path, ...],
    steps: tuple[int, ...],
    seeds: int,
    others: tuple[str, ...],
    archive: Path,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Compare meta-trained rules with their untrained selves and with Adam, on each family that the first of RUNS had.

    RUNS are run folders or rule files. Families under --other were not trained on.
    """
    if picture is not None and not all(run.is_dir() for run in runs):
        raise click.UsageError("--picture draws how training went: give folders of runs, not rule files")
    torch.set_num_threads(threads)
    console = setting.make_console()
    archive.mkdir(parents=True, exist_ok=True)
    rules, tasks = list_rules(runs)
    names = [label for label in rules if not label.endswith(", untrained")]
    results: dict[str, Losses] = {}
    for where, task in (tasks | {f"{name} (not trained on)": {"name": name} for name in others}).items():
        family = build("task", TASKS, task)
        for count in steps:
            title = f"{where}, {count} steps"
            console.print(title, highlight=False)
            results[title] = measure(rules, Setting(title, family, count), seeds, archive, console)
            summaries = {label: summarize(results, label) for label in names}
            summary = {
                label: {key: keep_finite(x) for key, x in figures.items()} for label, figures in summaries.items()
            }
            content = {
                "rules": {label: rule.describe() for label, rule in rules.items()},
                "seeds": seeds,
                "tuning": asdict(TUNING),
                "versions": setting.list_versions(),
                "losses": results,
                "summary": summary,
            }
            setting.write_json(file, content)  # what is measured is not lost if the next one fails
    console.print(make_table(results))
    for label, figures in summaries.items():
        console.print(label, *(f"{key} {value:.3g}" for key, value in figures.items()), sep=", ", highlight=False)
    if picture is not None:
        curves = {name: read_curve(read_metrics(run / METRICS)) for name, run in zip(summaries, runs, strict=True)}
        means = {title: {label: average(x) for label, x in losses.items()} for title, losses in results.items()}
        picture.write_bytes(draw_field(curves, means, CONSTANT))
