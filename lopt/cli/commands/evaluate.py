"""`lopt eval`: compare a rule with tuned baselines on held-out tasks, in tables, pictures and one HTML page.

What it is judged on is chosen in `lopt.evaluation.settings`; tuned baselines are kept in an archive that all runs of a
folder share.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from lopt.cli.console import ARCHIVE, RUNS, compare_all, make_folder, open_rule, show

if TYPE_CHECKING:
    from lopt.rules import Rule

EXAMPLES = """
\b
Examples:
  lopt eval digits-lstm
  lopt eval runs/q --steps 200 --seeds 50
  lopt eval my.safetensors --task mlp --set width=40 --set activation=relu --baselines adam,nesterov
  lopt eval my.safetensors --suite development --workers 2

RULE is a shipped name (see `lopt list shipped`), the name of an untrained rule (`lopt list rules`), a rule file or the
folder of a run. Without --task, --set and --steps it is judged on all settings that its training card names; with
--suite on programs that its users might write, against optimizers from libraries (see docs/suites.md).
"""


@click.command(name="eval", short_help="Compare a rule with tuned baselines.", epilog=EXAMPLES)
@click.argument("rule")
@click.option("--task", help="Task family, see `lopt list tasks`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Option of the task; repeatable.")
@click.option("--steps", type=click.IntRange(min=1), multiple=True, help="Length of the runs; repeatable.")
@click.option("--seeds", type=click.IntRange(min=1), help="Held-out tasks [default: the card's, or 20].")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws other held-out tasks.")
@click.option("--baselines", help="Comma-separated; all seven by default.")
@click.option("--suite", type=click.Choice(["development", "heldout", "large"]), help="Judge on a suite of programs.")
@click.option("--tasks", help="Of the suite: some, comma-separated.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that run a suite [default: all cores].")
@click.option("--criterion", type=click.Choice(["final", "mean"]), default="final", show_default=True)
@click.option(
    "--archive",
    type=click.Path(path_type=Path),
    help="Tuned baselines [default: runs/baselines; of a suite the package's].",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report [default: runs/eval-RULE-OPTIONS].")
@click.option("--json", "as_json", is_flag=True, help="Print the comparisons as JSON.")
def judge_rule(
    rule: str,
    task: str | None,
    overrides: tuple[str, ...],
    steps: tuple[int, ...],
    seeds: int | None,
    seed: int,
    baselines: str | None,
    suite: str | None,
    tasks: str | None,
    workers: int | None,
    criterion: str,
    archive: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare RULE with learning-rate-tuned baselines on held-out tasks; tables, pictures, one HTML page."""
    from lopt.cli.run_folder import read_command, slugify
    from lopt.core.names import choose
    from lopt.evaluation.baselines import BASELINES
    from lopt.evaluation.settings import UnclearTask, check_label, choose_settings, read_card

    path, learned, content = open_rule(rule)
    check_suite(suite, own=bool(tasks or workers), foreign=bool(task or overrides or steps or seed or baselines))
    if suite is not None:
        _judge_suite(path, learned, content, suite, tasks, seeds, workers, archive, out, as_json)
        return
    card = read_card(content)
    try:
        settings = choose_settings(card, task, overrides, steps)
    except UnclearTask as error:
        raise click.UsageError(f"{rule} {error}") from error
    label = check_label(card.name or path.stem)
    names = [choose("baseline", name.strip(), BASELINES) for name in baselines.split(",")] if baselines else BASELINES

    # What was asked for names the folder, so that evaluations with other options do not overwrite each other.
    asked = {"steps": steps, "seeds": seeds, "seed": seed, "criterion": criterion if criterion != "final" else ""}
    words = ["eval", label, task, *overrides, baselines, *(f"{key} {value}" for key, value in asked.items() if value)]
    out = out or RUNS / slugify(" ".join(filter(None, words)))
    archive = archive or ARCHIVE
    make_folder(out)
    make_folder(archive)

    console = Console(stderr=as_json)
    comparisons = compare_all(
        {label: learned},
        settings,
        console,
        num_seeds=seeds or (card.config.evaluation.seeds if card.config else 20),
        seed=seed,
        baselines=names,
        criterion=criterion,
        archive=archive,
    )
    show(comparisons, out, console, read_command())
    if as_json:
        click.echo(json.dumps([comparison.to_json() for comparison in comparisons]))


def check_suite(suite: str | None, *, own: bool, foreign: bool) -> None:
    """Refuse options that do not go together.

    Args:
        own: an option was given that only suites have.
        foreign: one was given that suites do not have.
    Raises:
        UsageError: they do not.
    """
    if suite is None and own:
        raise click.UsageError("--tasks and --workers are of a --suite")
    if suite is not None and foreign:
        raise click.UsageError("a --suite has its own tasks, lengths, seeds and contenders: give --tasks or --seeds")


def _judge_suite(
    path: Path,
    rule: Rule,
    card: dict[str, Any],
    suite: str,
    tasks: str | None,
    seeds: int | None,
    workers: int | None,
    archive: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from lopt.cli.run_folder import read_command, slugify
    from lopt.cli.suites import count_workers, judge_on_suite

    console = Console(stderr=as_json)
    result = judge_on_suite(
        path,
        rule,
        card,
        suite,
        out or RUNS / slugify(f"eval {card.get('name') or path.stem} {suite}"),
        console,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else None,
        workers=count_workers(workers),
        command=read_command(),
        **({"num_seeds": seeds} if seeds else {}),
        **({"tuned": archive} if archive else {}),
    )
    if as_json and result is not None:
        click.echo(json.dumps(result.to_json()))
