"""What several commands do: train, judge, compare and tell of it on a console; open rules; make folders.

Functions here print, and end the process with status 130 on a signal, after saying how to go on; what computes is below
this folder.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

import lopt

if TYPE_CHECKING:
    from rich.console import Console

    from lopt.evaluation.results import Comparison
    from lopt.meta.config.run import RunConfig
    from lopt.meta.config.settings import Setting
    from lopt.meta.trainer.trainer import Trainer
    from lopt.rules import Rule

RUNS = Path("runs")
ARCHIVE = RUNS / "baselines"


def run_trainer(trainer: Trainer, console: Console, time_limit: float | None = None) -> None:
    """Train with a progress bar, from what the rule and its tasks are to where the best rule was written.

    On a signal the state is saved, the console says how to resume, and the process exits with status 130.

    Args:
        trainer: new or resumed; its folder holds the rule.
        console: quiet on all ranks but the first.
        time_limit: seconds after which training ends with the best rule so far; None: only with its last step.
    """
    from lopt.cli.progress import TrainingProgress
    from lopt.meta.runs.folder import resume_command
    from lopt.meta.runs.memory import explain_memory
    from lopt.meta.trainer.trainer import Interrupted

    # What will run: the rule, its families with their shares, and how the steps fit into memory.
    several = len(trainer.sources) > 1
    console.print(escape(trainer.rule.describe()), soft_wrap=True)
    for source in trainer.sources:
        share = f" ({source.name}: {source.tasks} tasks, {source.estimator.name}, weight {source.weight:g})"
        console.print(escape(f"  on {source.family.describe()}{share if several else ''}"), soft_wrap=True)
        if getattr(source.estimator, "objective", "") == "baseline" and source.family.baseline is None:
            say(console, f"  {source.name}: objective 'baseline' takes tuned Adam on the family's default options")
    for plan in trainer.plans:
        say(console, f"  {plan}")
    try:
        with explain_memory(trainer.card["config"]), TrainingProgress(console, trainer) as progress:
            trainer.run(progress.update, time_limit)
    except Interrupted:
        hint = resume_command(trainer.rule_path.parent)
        say(console, f"stopped at step {trainer.step} and saved; go on with: {hint}")
        sys.exit(130)
    # There are three ends: the last step, the end of the time, or no better validation for long.
    steps = trainer.config.steps
    if not trainer.finished:
        hint = resume_command(trainer.rule_path.parent)
        say(console, f"the time is over at step {trainer.step} of {steps}; go on with: {hint}")
    elif trainer.step < steps:
        say(console, f"ended at step {trainer.step} of {steps}: {trainer.best.stale} validations without a better one")
    say(console, f"best on held-out tasks: {trainer.best.value:.4g} at step {trainer.best.step}; {trainer.rule_path}")


def say(console: Console, text: str) -> None:
    """Print a line as it is, without colours or markup: unbroken, so that a path or a command can be copied from it,
    and safe for names that look like markup.
    """
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def judge_run(config: RunConfig, trainer: Trainer, console: Console) -> list[dict[str, Any]]:
    """Compare a run's rule with tuned baselines on the settings of its configuration, write the report into the run's
    folder, and put the results into the rule's card. On Ctrl-C the process exits with status 130; the rule is
    trained all the same.

    Returns:
        The results as the card holds them.
    """
    from lopt.evaluation.settings import summarize_results
    from lopt.meta.config.settings import list_settings
    from lopt.meta.runs.folder import resume_command

    rules, settings, seeds = {config.name: trainer.build_best()}, list_settings(config), config.evaluation.seeds
    try:
        comparisons = compare_all(rules, settings, console, num_seeds=seeds, archive=ARCHIVE)
    except KeyboardInterrupt:
        hint = resume_command(trainer.rule_path.parent)
        say(console, f"stopped while judging; the rule is trained: {trainer.rule_path}\ngo on with the judging: {hint}")
        sys.exit(130)
    trainer.card["results"] = summarize_results(comparisons)
    trainer.save_rule()
    show(comparisons, trainer.rule_path.parent, console, command=trainer.card["command"])
    return trainer.card["results"]  # type: ignore[no-any-return]


def compare_all(
    rules: dict[str, Rule], settings: Sequence[Setting], console: Console, **options: Any
) -> list[Comparison]:
    """Compare rules with tuned baselines on every setting, and say what goes on, as a search may take minutes.

    Args:
        rules: by label, the first is the one that is judged.
        settings: in the order of the report.
        options: further arguments of `lopt.evaluation.comparison.compare`.
    """
    from lopt.cli.progress import PlainProgress
    from lopt.evaluation.baselines import BASELINES
    from lopt.evaluation.comparison import DEFAULT_TUNING, compare
    from lopt.meta.runs.memory import explain_memory

    comparisons: list[Comparison] = []
    # The searches take nearly all of the time; those that are archived are not heard of.
    searches = len(options.get("baselines", BASELINES)) * len(DEFAULT_TUNING.schedules)
    with console.status("") as status, PlainProgress(console, "judging") as plain:
        for number, (title, family, steps) in enumerate(settings):
            name, begun = title or family.describe(), itertools.count()

            def tell(doing: str, begun: Iterator[int] = begun, number: int = number) -> None:
                status.update(escape(doing))
                plain.update((number + min(1.0, next(begun) / (searches + 1))) / len(settings), doing)

            tell(f"evaluating {name}")
            sizes = {"task": dict(family.config), "steps": steps, "seeds": options.get("num_seeds", 0)}
            with explain_memory(sizes):
                on_search = partial(_prefix, tell, f"{name}: tuning ")
                comparisons.append(compare(rules, family, steps, title=title, on_search=on_search, **options))
    return comparisons


def _prefix(tell: Callable[[str], None], prefix: str, text: str) -> None:
    tell(prefix + text)


def show(comparisons: Sequence[Comparison], folder: Path, console: Console, command: str) -> None:
    """Print the tables of an evaluation, write its page, pictures and JSON, and say where they are.

    Args:
        folder: exists; an earlier report in it is replaced.
        command: that repeats the evaluation, for the page.
    """
    from lopt.evaluation.report.page import print_table, write_report

    for comparison in comparisons:
        print_table(comparison, console)
    for name, path in write_report(folder, comparisons, command=command).items():
        say(console, f"{name:>16}  {path}")


def open_rule(name: str) -> tuple[Path, Rule, dict[str, Any]]:
    """A rule from a shipped name, a file, an address on the hub, a run's folder or the name of an untrained one: a path
    to name it by, which on the hub is no file, the rule and its card.

    A card that is not understood is left out, with a note.
    """
    from lopt.evaluation.settings import read_card
    from lopt.rules import RULES
    from lopt.rules.files import load_with_card
    from lopt.rules.hub import is_address, parse_address

    path = Path(parse_address(name).repository if is_address(name) else name)
    if path.is_dir() and not is_address(name):
        path = path / "rule.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"there is no rule in the folder {name} (no rule.safetensors)")
        name = str(path)
    if name in RULES and name not in lopt.list_rules() and not path.exists():
        return path, RULES[name](), {}
    rule, card = load_with_card(name)
    try:
        read_card(card)
    except ValueError as error:
        click.echo(f"lopt: note: the training card of {name} is not understood and ignored: {error}", err=True)
        card = {}
    return path, rule, card


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that one that cannot be written is known before hours of work are done for it.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
