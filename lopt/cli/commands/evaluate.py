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

from lopt.cli.console import ARCHIVE, RUNS, make_folder, show
from lopt.cli.few_shot import parse_numbers

if TYPE_CHECKING:
    from lopt.rules import Rule

EXAMPLES = """
\b
Examples:
  lopt eval digits-lstm
  lopt eval runs/q --steps 200 --seeds 50
  lopt eval my.safetensors --task mlp --set width=40 --set activation=relu --baselines adam,nesterov
  lopt eval my.safetensors --suite development --workers 2
  lopt eval runs/sinusoid-maml --shots 5,10,20 --steps 1,10 --tasks 600

RULE is a shipped name (see `lopt list shipped`), the name of an untrained rule (`lopt list rules`), a rule file or the
folder of a run. Without --task, --set and --steps it is judged on all settings that its training card names; with
--suite on programs that its users might write, against optimizers from libraries (see docs/suites.md).
"""


@click.command(name="eval", short_help="Compare a rule with tuned baselines.", epilog=EXAMPLES)
@click.argument("rule")
@click.option("--task", help="Task family, see `lopt list tasks`.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Option of the task; repeatable.")
@click.option("--steps", multiple=True, help="Length of the runs, or several: 1,10; repeatable.")
@click.option("--shots", multiple=True, help="Adapt a learned start to so many examples, or several: 5,10,20.")
@click.option("--seeds", type=click.IntRange(min=1), help="Held-out tasks [default: the card's, or 20].")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Draws other held-out tasks.")
@click.option("--baselines", help="Comma-separated; all seven by default.")
@click.option("--suite", type=click.Choice(["development", "heldout", "large"]), help="Judge on a suite of programs.")
@click.option("--tasks", help="Of a suite: some, comma-separated. With --shots: how many held-out ones [default: 600].")
@click.option("--lr", type=float, help="On a suite: factor on the rule's steps [default: 1].")
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["loss", "num_steps", "end"]),
    help="On a suite: not told; num_steps: until it is to cool down; end: ever. Repeatable.",
)
@click.option("--against", multiple=True, help="On a suite: another rule, run and compared with; repeatable.")
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
    seeds: int | None,
    suite: str | None,
    archive: Path | None,
    out: Path | None,
    as_json: bool,
    shots: tuple[str, ...],
    **options: Any,
) -> None:
    """Compare RULE with learning-rate-tuned optimizers on held-out tasks; tables, pictures, one HTML page."""
    from lopt.evaluation.judging import open_rule

    own = {name: options.pop(name) for name in ("tasks", "lr", "without", "against", "workers")}
    options["steps"] = tuple(parse_numbers("--steps", options["steps"]))
    if shots:
        _judge_on_shots(rule, shots, suite, seeds, archive, out, as_json, **own, **options)
        return
    if suite is None and any(own.values()):
        raise click.UsageError("--tasks, --lr, --without, --against and --workers are of a --suite")
    if suite is not None and any(value for name, value in options.items() if name != "criterion"):
        raise click.UsageError("a --suite has its own tasks, lengths, seeds and contenders: give --tasks or --seeds")
    path, learned, card = open_rule(rule)
    if suite is not None:
        _judge_on_suite(rule, path, learned, card, suite, out, as_json, num_seeds=seeds, tuned=archive, **own)
    else:
        _judge_on_tasks(rule, path, learned, card, out, as_json, seeds=seeds, archive=archive or ARCHIVE, **options)


def _judge_on_shots(
    rule: str,
    shots: tuple[str, ...],
    suite: str | None,
    seeds: int | None,
    archive: Path | None,
    out: Path | None,
    as_json: bool,
    *,
    tasks: str | None,
    steps: tuple[int, ...],
    seed: int,
    criterion: str,
    **others: Any,
) -> None:
    from lopt.cli.few_shot import TASKS, judge_few_shots
    from lopt.evaluation.judging import open_rule

    if suite or seeds or archive or any(others.values()) or criterion != "final":
        raise click.UsageError("with --shots give --steps, --tasks, --seed, --out and --json alone")
    (count,) = parse_numbers("--tasks", [tasks]) if tasks else [TASKS]
    path, learned, card = open_rule(rule)
    numbers = parse_numbers("--shots", shots)
    console = Console(stderr=as_json)
    given = {"steps": steps, "tasks": count, "seed": seed, "out": out, "as_json": as_json}
    judge_few_shots(path, learned, card, numbers, console, **given)  # type: ignore[arg-type]


def _judge_on_tasks(
    rule: str,
    path: Path,
    learned: Rule,
    content: dict[str, Any],
    out: Path | None,
    as_json: bool,
    *,
    task: str | None,
    overrides: tuple[str, ...],
    steps: tuple[int, ...],
    seeds: int | None,
    seed: int,
    baselines: str | None,
    criterion: str,
    archive: Path,
) -> None:
    from lopt.core.names import choose
    from lopt.evaluation.baselines import BASELINES
    from lopt.evaluation.behaviour.facts import describe_rule
    from lopt.evaluation.judging import count_seeds, judge, name_source
    from lopt.evaluation.settings import UnclearTask, choose_settings, read_card
    from lopt.meta.config.settings import check_label
    from lopt.meta.runs.folder import read_command, slugify

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
    comparisons = judge(
        {label: learned},
        settings,
        console,
        num_seeds=seeds or count_seeds(card),
        seed=seed,
        baselines=names,
        criterion=criterion,
        archive=archive,
        about=describe_rule(learned, content),
        source=name_source(rule, path),
    )
    show(comparisons, out, console, read_command())
    if as_json:
        click.echo(json.dumps([comparison.to_json() for comparison in comparisons]))


def _judge_on_suite(
    rule: str,
    path: Path,
    learned: Rule,
    card: dict[str, Any],
    suite: str,
    out: Path | None,
    as_json: bool,
    *,
    tasks: str | None,
    lr: float | None,
    without: tuple[str, ...],
    against: tuple[str, ...],
    workers: int | None,
    **options: Any,
) -> None:
    from lopt.cli.suites import count_workers, judge_on_suite
    from lopt.evaluation.behaviour.facts import describe_rule
    from lopt.evaluation.judging import name_source, open_rule
    from lopt.evaluation.suites.judging import Entrant
    from lopt.evaluation.suites.work import read_share
    from lopt.meta.runs.folder import read_command, slugify

    entrants = [Entrant(card.get("name") or path.stem, learned, without, 1.0 if lr is None else lr)]
    for name in against:
        _, other, about = open_rule(name)
        entrants.append(Entrant(about.get("name") or name, other))
    console = Console(stderr=as_json, quiet=read_share().rank > 0)
    out = out or RUNS / slugify(f"eval {entrants[0].label} {suite}")
    options |= {"tasks": [name.strip() for name in tasks.split(",")] if tasks else None}
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"command": read_command(), "workers": count_workers(workers)}
    given |= {"about": describe_rule(learned, card), "source": name_source(rule, path)}
    result = judge_on_suite(path, entrants, suite, out, console, **given)
    if as_json and result is not None:
        click.echo(json.dumps(result.to_json()))
