"""The command line: `lopt demo | train | eval | list | inspect | report`. Wiring only: parse, build, call, print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.table import Table
except ImportError as missing:
    sys.exit(f"lopt: the command line needs the extra 'train' ({missing}): pip install 'lopt[train]'")

import lopt

EXAMPLES = {
    "train": """
\b
Examples:
  lopt train digits-lstm
  lopt train quadratic-lstm --out runs/q --set trainer.steps=500 --set rule.hidden=16
  lopt train my.toml
  lopt train --resume runs/q
""",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lopt.__version__, prog_name="lopt")
def cli() -> None:
    """Learned optimizers for PyTorch: train an update rule on many small tasks, use it on any model."""


@cli.command(epilog=EXAMPLES["train"])
@click.argument("preset", required=False)
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with this run's folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run [default: runs/PRESET].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--seed", type=click.IntRange(min=0), help="Short for --set trainer.seed=N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Meta-train a rule from PRESET (see `lopt list`) or a TOML file."""
    from lopt.config import load_config
    from lopt.runs import resume_run, start_run

    if resume is not None:
        if preset or out or overrides or seed is not None:
            raise click.UsageError("--resume takes its settings from the run; give nothing else")
        folder, trainer = resume, resume_run(resume)
    elif preset is None:
        raise click.UsageError("give a PRESET or --resume RUN; `lopt list presets` shows the presets")
    else:
        changes = [*overrides, *([f"trainer.seed={seed}"] if seed is not None else [])]
        config = load_config(preset, changes)
        folder = out or Path("runs") / config.name
        trainer = start_run(config, folder)
    console = Console(stderr=as_json)
    console.print(f"[bold]{trainer.rule.describe()}[/] on {trainer.family.describe()}")
    run_trainer(trainer, console, folder)
    result = {"rule": str(folder / "rule.safetensors"), "best": trainer.best, "step": trainer.best_step}
    if as_json:
        click.echo(json.dumps(result))
    else:
        console.print(f"best validation loss {trainer.best:.4g} at step {trainer.best_step}: {result['rule']}")


def run_trainer(trainer: Any, console: Console, folder: Path) -> None:
    """Train with a progress bar; on a signal say how to resume and exit with 130."""
    from lopt.progress import TrainingProgress
    from lopt.trainer import Interrupted

    try:
        with TrainingProgress(console, trainer) as progress:
            trainer.run(progress.update)
    except Interrupted:
        console.print(f"stopped at step {trainer.step} and saved; go on with: lopt train --resume {folder}")
        sys.exit(130)


@cli.command(name="list")
@click.argument("what", type=click.Choice(["rules", "tasks", "estimators", "presets"]), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(what: str | None, as_json: bool) -> None:
    """List shipped rules, presets, and what rules, tasks and estimators there are."""
    from lopt.config import list_presets
    from lopt.estimators import ESTIMATORS
    from lopt.rules import RULES
    from lopt.tasks import TASKS

    def first_lines(registry: dict[str, Any]) -> dict[str, str]:
        return {key: (cls.__doc__ or "").strip().splitlines()[0] for key, cls in registry.items()}

    contents: dict[str, Callable[[], dict[str, str]]] = {
        "shipped": lambda: {name: lopt.load_card(name).get("description", "") for name in lopt.list_rules()},
        "presets": list_presets,
        "rules": lambda: first_lines(RULES),
        "tasks": lambda: first_lines(TASKS),
        "estimators": lambda: first_lines(ESTIMATORS),
    }
    chosen = {key: contents[key]() for key in ([what] if what else contents)}
    if as_json:
        click.echo(json.dumps(chosen))
        return
    console = Console()
    for title, entries in chosen.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        for row in entries.items():
            table.add_row(*row)
        console.print(table, "")


def main() -> None:
    """Run the command line; bad input ends in one line and exit status 2, not in a traceback."""
    try:
        cli(standalone_mode=True)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        click.echo(f"lopt: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
