"""Returns on held-out bodies: a learned start after few steps, beside tuned learning from scratch and a joint start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.few_shot_runs import load_start
from lopt.evaluation.control import draw_returns, follow_returns
from lopt.evaluation.few_shot import JOINT, OPTIMIZERS, RANDOM, train_jointly, tune, wrap_start
from lopt.evaluation.statistics import summarize
from lopt.rules import RULES
from lopt.tasks.control.rollouts import Rollouts

GRID = tuple(10 ** (k / 4) for k in range(-6, 3))
"""Learning rates of baselines, from .03 to 3."""


def make_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], bodies: int, few: int, reference: str) -> Table:
    """A row per start, columns by step; the differences, to the reference and to the joint start, are of few steps."""
    steps = list(next(iter(rows.values())))
    title = f"return on {bodies} held-out bodies; the reference is {reference}"
    less = [f"{few} steps less {other}" for other in ("reference", JOINT)]
    table = setting.start_table(title, ["", *(f"{n} steps" for n in steps), *less])
    for label, cells in rows.items():
        texts = [f"{cell['return']:.2f} \u00b1 {cell['interval']:.2f}" for cell in cells.values()]
        last = cells[str(few)]
        paired = [f"{last[key]:+.2f} \u00b1 {last[f'{key}_interval']:.2f}" for key in ("difference", "over_joint")]
        table.add_row(label, *texts, *paired)
    return table


def summarize_rows(returns: Mapping[str, Tensor], few: int, many: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Means with half of their 95 % intervals over bodies, and differences that are paired by body.

    Those are to learning from scratch for many steps, and to the joint start as tuned for few, after as many steps.

    Args:
        returns: `[many + 1, bodies]` by row.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    joint = returns[label_tuned(JOINT, few)]
    for label, values in returns.items():
        rows[label] = {}
        for n in (0, few, many):
            figures = {
                "return": ("interval", values[n]),
                "difference": ("difference_interval", values[n] - returns[RANDOM][many]),
                "over_joint": ("over_joint_interval", values[n] - joint[n]),
            }
            cell = rows[label][str(n)] = {}
            for key, (half, numbers) in figures.items():
                found = summarize(numbers.tolist())
                cell |= {key: found.mean, half: 1.96 * (found.stderr or 0.0)}
    return rows


def label_tuned(row: str, steps: int) -> str:
    """What a row is called whose learning rate is the best for so many steps."""
    return f"{row}, tuned for {steps} steps"


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--bodies", default=32, show_default=True, type=click.IntRange(min=2), help="Held-out bodies.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=2), help="Of learning from scratch.")
@click.option("--tuning-tasks", default=32, show_default=True, type=click.IntRange(min=1), help="Bodies to tune on.")
@click.option("--joint-steps", default=300, show_default=True, type=click.IntRange(min=1), help="Of joint training.")
@click.option("--joint-rate", default=3e-2, show_default=True, help="Its outer learning rate.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws the held-out bodies.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def control(
    run: Path,
    bodies: int,
    steps: int,
    tuning_tasks: int,
    joint_steps: int,
    joint_rate: float,
    seed: int,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge a learned start by the returns of held-out bodies.

    RUN is a run folder or rule file of a start trained on control. Baselines take the better of SGD and Adam with the
    best of nine learning rates on other bodies, tuned for STEPS steps, and for as few as RUN is trained for.
    """
    torch.set_num_threads(threads)
    console, start = setting.make_console(), load_start(run, Rollouts, "control-arm")
    family, few = start.family, start.steps
    if few >= steps:
        raise click.UsageError(f"--steps must be above the {few} steps that {run} is trained for, got {steps}")
    joint = train_jointly(family, 0, steps=joint_steps, learning_rate=joint_rate)
    contenders = {RANDOM: [RULES[name]() for name in OPTIMIZERS], JOINT: [wrap_start(joint, x) for x in OPTIMIZERS]}
    returns, tuned = {start.label: follow_returns(start.rule, family, bodies, steps, seed=seed)}, {}
    for row, rules in contenders.items():
        for n in (steps, few):
            label = row if n == steps else label_tuned(row, few)
            rule, tuned[label] = tune(rules, family, n, 0, grid=GRID, tasks=tuning_tasks)
            returns[label] = follow_returns(rule, family, bodies, steps, seed=seed)
    rows = summarize_rows(returns, few, steps)
    curves = {label: values.mean(1).tolist() for label, values in returns.items()}
    content = {"results": rows, "tuned": tuned, "curves": curves, "versions": setting.list_versions()}
    setting.write_json(file, content)
    console.print(make_table(rows, bodies, few, f"{RANDOM} after {steps} steps"))
    for label, text in tuned.items():
        console.print(f"{label}: {text}")
    if picture is not None:
        drawn = {label: values for label, values in returns.items() if label in (start.label, RANDOM, JOINT)}
        picture.write_bytes(draw_returns(drawn, start.label, RANDOM, few))
