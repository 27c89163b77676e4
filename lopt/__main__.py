"""The command line: `lopt demo | train | sweep | eval | import | list | inspect | report`. Wiring only.

A command is a file in `lopt/cli/commands`. What is heavy (torch, matplotlib, the rules) they import when they run, so
that `lopt --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings

try:
    import click
    import rich.console  # noqa: F401
except ImportError as missing:
    sys.exit(f"lopt: the command line needs the extra 'train' ({missing}): pip install 'lopt[train]'")

import lopt
from lopt.cli.commands.demo import run_demo
from lopt.cli.commands.evaluate import judge_rule
from lopt.cli.commands.import_rule import import_weights
from lopt.cli.commands.inspect_rule import show_rule
from lopt.cli.commands.list import list_kinds
from lopt.cli.commands.report import report_run
from lopt.cli.commands.sweep import sweep_settings
from lopt.cli.commands.train import train_rule

MAX_ERROR = 2000  # characters


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lopt.__version__, prog_name="lopt")
def cli() -> None:
    """Learned optimizers for PyTorch: train an update rule on many small tasks, use it on any model."""


for command in (
    train_rule,
    sweep_settings,
    judge_rule,
    run_demo,
    import_weights,
    list_kinds,
    show_rule,
    report_run,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; bad input ends in one line and exit status 2, not in a traceback.

    A run of several processes that lost one of them ends with status 1: it can go on, nothing that was given is wrong.
    With `LOPT_TRACEBACK` set in the environment bad input is raised, to be debugged.
    """
    # For people: without the line of code that it comes from.
    warnings.formatwarning = lambda message, *_, **__: f"lopt: note: {message}\n"
    try:
        cli(standalone_mode=True)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        click.echo(f"lopt: error: {_show(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        from lopt.meta.trainer.ranks import FailedLead, LostRank  # whoever raises them has imported torch anyway

        if isinstance(error, FailedLead):  # each host has a log of its own
            click.echo(f"lopt: error: {_show(error)} (on rank 0)", err=True)
            sys.exit(2)
        if isinstance(error, LostRank):
            click.echo(f"lopt: error: {_show(error)}; the run can go on from its last checkpoint", err=True)
            sys.exit(1)
        raise


def _show(error: Exception) -> str:
    """Its message, of which nothing steers the terminal: it may quote what a stranger wrote."""
    from lopt.core.foreign_text import make_printable

    return make_printable(error, MAX_ERROR, keep="\n")


if __name__ == "__main__":
    main()
