"""How rules do on convnets of widths that they were not trained on, beside SGD and Adam with tuned learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.table import Table

from bench import setting
from lopt.evaluation.baselines import Grid, Tuning
from lopt.evaluation.comparison import DEFAULT_LABEL, compare
from lopt.evaluation.judging import open_rule
from lopt.evaluation.report.curves import plot_curves
from lopt.evaluation.results import Comparison
from lopt.rules import Rule
from lopt.tasks.conv import Conv

BASELINES = ("sgd", "adam")
GRID = Grid(low=-12, high=0)  # factors of sqrt(2) up to 1; a search goes on where its best is at an edge


def load_rules(names: Sequence[str]) -> dict[str, Rule]:
    """Rules by what tables call them.

    Raises:
        click.UsageError: two of them have the same name.
    """
    opened = [open_rule(name) for name in names]
    labels = [card.get("name") or path.stem for path, _, card in opened]
    if len(set(labels)) < len(labels):
        raise click.UsageError(f"rules must have different names, as rows of the table do, got {', '.join(labels)}")
    return dict(zip(labels, (rule for _, rule, _ in opened), strict=True))


def make_table(comparisons: Sequence[Comparison]) -> Table:
    """A row per optimizer, for each width its final loss and the ratio of it to tuned Adam's with a 95 % interval."""
    heads = [column for c in comparisons for column in (c.title, "to tuned Adam")]
    first = comparisons[0]
    title = f"final training loss after {first.num_steps} steps, means over {first.num_seeds} held-out tasks"
    table = setting.start_table(title, ["", *heads])
    for entry in first.entries:
        cells = []
        for comparison in comparisons:
            final = next(e for e in comparison.entries if e.label == entry.label).pick("final")
            mean = final.summarize("final").mean
            rate = "" if final.lr is None or entry.label == DEFAULT_LABEL else f" ({final.lr:.3g}, {final.schedule})"
            cells.append("diverged" if mean is None else f"{mean:.4f}{rate}")
            cells.append(_describe_ratio(comparison, entry.label))
        table.add_row(entry.label, *cells)
    return table


def _describe_ratio(comparison: Comparison, label: str) -> str:
    for contest in comparison.contests:
        if (contest.label, contest.against, contest.figure) == (label, "adam", "final"):
            ratio = contest.ratio
            return "" if None in (ratio.value, ratio.low) else f"{ratio.value:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"
    return ""


@click.command()
@click.argument("rules", nargs=-1, required=True)
@click.option("--width", "widths", default=(4, 16), show_default=True, multiple=True, type=click.IntRange(min=1))
@click.option("--steps", default=200, show_default=True, type=click.IntRange(min=1), help="Length of the runs.")
@click.option("--tasks", default=32, show_default=True, type=click.IntRange(min=2), help="Held-out tasks.")
@click.option(
    "--tuning-tasks", default=16, show_default=True, type=click.IntRange(min=1), help="That rates are tuned on."
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def widths(
    rules: tuple[str, ...],
    widths: tuple[int, ...],
    steps: int,
    tasks: int,
    tuning_tasks: int,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge RULES on convnets on digits, of several widths, beside SGD and Adam.

    RULES are shipped names, names of untrained rules, rule files or run folders. SGD and Adam take the best of their
    learning rates and of a constant and a cosine schedule, found on other tasks.
    """
    torch.set_num_threads(threads)
    console = setting.make_console()
    loaded = load_rules(rules)
    tuning = Tuning(grid=GRID, num_seeds=tuning_tasks)
    comparisons: list[Comparison] = []
    for width in dict.fromkeys(widths):
        title = f"width {width}"
        comparisons.append(
            compare(loaded, Conv(width=width), steps, tasks, baselines=BASELINES, tuning=tuning, title=title)
        )
        setting.write_json(file, {"results": [asdict(c) for c in comparisons], "versions": setting.list_versions()})
    console.print(make_table(comparisons))
    if picture is not None:
        picture.write_bytes(plot_curves(comparisons))
