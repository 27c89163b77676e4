"""What several commands do: train, judge and tell of it on a console; make folders.

Functions here print, and end the process with status 130 on a signal, after saying how to go on; what computes is below
this folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lopt.core.printing import say

if TYPE_CHECKING:
    from rich.console import Console

    from lopt.evaluation.results import Comparison
    from lopt.meta.config.run import RunConfig
    from lopt.meta.trainer.trainer import Trainer

RUNS = Path("runs")
ARCHIVE = RUNS / "baselines"


def run_trainer(trainer: Trainer, console: Console, time_limit: float | None = None, again: str | None = None) -> None:
    """Train on a console; on a signal the process exits with status 130, once the state is saved and it is said how to
    go on.

    Args:
        trainer: new or resumed; its folder holds the rule.
        console: quiet on all ranks but the first.
        time_limit: seconds after which training ends with the best rule so far; None: only with its last step.
        again: the command that goes on with the run; by default `lopt train --resume`.
    """
    from lopt.meta.runs import training
    from lopt.meta.trainer.trainer import Interrupted

    try:
        training.run_trainer(trainer, console, time_limit)
    except Interrupted as stop:
        say(console, str(stop) if again is None else f"stopped at step {trainer.step} and saved; go on with: {again}")
        sys.exit(130)


def judge_run(config: RunConfig, trainer: Trainer, console: Console, again: str | None = None) -> list[dict[str, Any]]:
    """Compare a run's rule with tuned baselines on the settings of its configuration, write the report into the run's
    folder, and put the results into the rule's card. On Ctrl-C the process exits with status 130; the rule is
    trained all the same.

    Args:
        again: the command that goes on with the judging; by default `lopt train --resume`.
    Returns:
        The results as the card holds them.
    """
    from lopt.evaluation.behaviour.facts import describe_rule
    from lopt.evaluation.judging import judge
    from lopt.evaluation.settings import summarize_results
    from lopt.meta.config.settings import list_settings
    from lopt.meta.runs.folder import resume_command

    rules, settings, seeds = {config.name: trainer.build_best()}, list_settings(config), config.evaluation.seeds
    told = {"about": describe_rule(trainer.rule, trainer.card), "source": str(trainer.rule_path)}
    try:
        comparisons = judge(rules, settings, console, num_seeds=seeds, archive=ARCHIVE, **told)
    except KeyboardInterrupt:
        hint = again or resume_command(trainer.rule_path.parent)
        say(console, f"stopped while judging; the rule is trained: {trainer.rule_path}\ngo on with the judging: {hint}")
        sys.exit(130)
    trainer.card["results"] = summarize_results(comparisons)
    trainer.save_rule()
    show(comparisons, trainer.rule_path.parent, console, command=trainer.card["command"])
    return trainer.card["results"]  # type: ignore[no-any-return]


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


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that one that cannot be written is known before hours of work are done for it.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")


def check_new_rule_file(out: Path, force: bool) -> None:
    """Refuse what a new rule file must not be called, before anything is done for it.

    Args:
        force: a file that is there is overwritten.
    Raises:
        UsageError: it does not end in ".safetensors".
        FileExistsError: it is there, and must not be overwritten.
    """
    if out.suffix != ".safetensors":
        raise click.UsageError(f"-o: a rule file is called *.safetensors, got {out}")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already: choose another -o, or overwrite it with --force")
