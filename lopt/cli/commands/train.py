"""`lopt train`: meta-train a rule from a preset or a TOML file, alone or in several processes, and judge it.

With several processes, which torchrun starts, rank 0 alone makes the folder, prints and judges; all of them make the
same calls in the same order.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lopt.cli.console import ARCHIVE, RUNS, judge_run, make_folder, run_trainer

EXAMPLES = """
\b
Examples:
  lopt train digits-lstm
  lopt train quadratic-lstm --out runs/q --set trainer.steps=500 --set rule.hidden=16
  lopt train my.toml
  lopt train --resume runs/q --time-limit 30m
  torchrun --nproc-per-node 2 --max-restarts 3 -m lopt train quadratic-lstm --set trainer.threads=1

Under torchrun the processes share the tasks of every outer step; one that is lost is started again, and the run goes on
from its last checkpoint. docs/train.md has more.
"""
SECONDS = {"s": 1, "m": 60, "h": 3600}


@click.command(name="train", short_help="Meta-train a rule and judge it.", epilog=EXAMPLES)
@click.argument("preset", required=False)
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with this run's folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run [default: runs/PRESET].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), help="Short for --set trainer.seed=N.")
@click.option("--log", "loggers", multiple=True, metavar="NAME", help="Log to it: see `lopt list loggers`; repeatable.")
@click.option("--device", help="Short for --set trainer.device=DEVICE; with --resume, go on there.")
@click.option(
    "--time-limit",
    metavar="TIME",
    help="End training after 90s, 30m or 1.5h with the best rule so far. Schedules follow the steps all the same.",
)
@click.option("--eval/--no-eval", "evaluate", default=True, help="Judge the finished rule [default: yes].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train_rule(
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seed: int | None,
    loggers: tuple[str, ...],
    device: str | None,
    time_limit: str | None,
    evaluate: bool,
    as_json: bool,
) -> None:
    """Meta-train a rule from PRESET (see `lopt list presets`) or a TOML file, and judge it."""
    from lopt.meta.runs.folder import resume_run, slugify
    from lopt.meta.runs.training import open_training
    from lopt.meta.trainer.ranks import join_ranks

    # Anything wrong with what was given is said before processes join each other or a folder is made.
    if resume is not None and (preset or out or overrides or loggers or seed is not None):
        raise click.UsageError("--resume takes its settings from the run; give nothing else")
    if resume is None and preset is None:
        raise click.UsageError("give a PRESET or --resume RUN; `lopt list presets` shows the presets")
    seconds = parse_duration(time_limit) if time_limit else None
    given = {"seed": seed, "device": device}
    changes = [*overrides, *(f"trainer.{key}={value}" for key, value in given.items() if value is not None)]
    if loggers:
        changes.append(f"loggers=[{', '.join(f'{{name={json.dumps(name)}}}' for name in loggers)}]")

    # The folder is this run's alone until the rule is judged.
    with ExitStack() as held:
        with join_ranks() as ranks:
            if resume is not None:
                config, trainer = resume_run(resume, ranks, device, held)
            else:
                config, trainer = open_training(
                    str(preset), changes, lambda config: out or RUNS / slugify(config.name), ranks, held
                )
            if evaluate:
                ranks.lead(lambda: make_folder(ARCHIVE))
            console = Console(stderr=as_json, quiet=not ranks.leads)
            run_trainer(trainer, console, seconds)

        # Judging needs one process; with --json the only thing on the standard output is the result.
        if not ranks.leads:
            return
        best = trainer.best.value
        result: dict[str, Any] = {"rule": str(trainer.rule_path), "step": trainer.best.step, "best": best}
        if evaluate:
            result["results"] = judge_run(config, trainer, console)
        if as_json:
            click.echo(json.dumps(result))


def parse_duration(text: str) -> float:
    """The seconds of a time limit, in the forms that people write: "90", "90s", "30m", "1.5h" or "1h30m".

    A number without a unit is seconds. Units may be combined in any order, and numbers may have decimals.

    Raises:
        ValueError: something else, or not positive.
    """
    text_with_unit = text + "s" * text[-1:].isdigit()
    amounts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text_with_unit)
    seconds = sum(float(number) * SECONDS[unit] for number, unit in amounts)
    if "".join(map("".join, amounts)) != text_with_unit or seconds <= 0:
        raise ValueError(f"a time is given as 90s, 30m, 1.5h or 1h30m, got {text!r}")
    return seconds
