"""The program `lopt`: demo, train, average, sweep, eval, portfolio, import, export, push, list, inspect and more.

A command is a file in `lopt/cli/commands`. What is heavy (torch, matplotlib, the rules) they import when they run, so
that `lopt --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings

import click
import rich.console  # noqa: F401  # is part of the extra that the command line needs

import lopt
from lopt.cli.commands.average import average_trained
from lopt.cli.commands.demo import run_demo
from lopt.cli.commands.evaluate import judge_rule
from lopt.cli.commands.import_rule import import_weights
from lopt.cli.commands.inspect_rule import show_rule
from lopt.cli.commands.list import list_kinds
from lopt.cli.commands.portfolio import learn_portfolio
from lopt.cli.commands.push import export_folder, push_rule
from lopt.cli.commands.report import report_run
from lopt.cli.commands.schema import print_schema
from lopt.cli.commands.sweep import sweep_settings
from lopt.cli.commands.train import train_rule

MAX_ERROR = 2000  # characters


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(lopt.__version__, prog_name="lopt")
def cli() -> None:
    """Learned optimizers for PyTorch: train an update rule on many small tasks, use it on any model."""


for command in (
    train_rule,
    average_trained,
    sweep_settings,
    judge_rule,
    learn_portfolio,
    run_demo,
    import_weights,
    export_folder,
    push_rule,
    list_kinds,
    show_rule,
    report_run,
    print_schema,
):
    cli.add_command(command)


def run_program() -> int:
    """Run the command that was typed; what goes wrong is told in one line, never in a traceback.

    With `LOPT_TRACEBACK` set in the environment errors are raised, to be debugged.

    Returns:
        The exit status: 2 for bad input; 130 after Ctrl-C; 1 for a run of several processes that lost one of them,
        which can go on as nothing that was given is wrong, and for what nobody has foreseen.
    """
    _prepare_output()
    try:
        return int(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except Exception as error:
        if os.environ.get("LOPT_TRACEBACK"):
            raise
        status, text = _describe_error(error)
        from lopt.core.foreign_text import make_printable  # an error may quote what a stranger wrote

        click.echo(f"lopt: error: {make_printable(text, MAX_ERROR, keep=chr(10))}", err=True)
        return status


def _prepare_output() -> None:
    """Have letters that a terminal cannot show replaced, and warnings told in a line of their own."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_, **__: f"lopt: note: {message}\n"


def _describe_error(error: Exception) -> tuple[int, str]:
    """Exit status and text."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return 2, f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return 2, str(error)
    from lopt.meta.runs.memory import is_out_of_memory  # whoever raises what follows has imported torch anyway
    from lopt.meta.trainer.ranks import FailedLead, LostRank

    if isinstance(error, FailedLead):  # each host has a log of its own
        return 2, f"{error} (on rank 0)"
    if isinstance(error, LostRank):
        return 1, f"{error}; the run can go on from its last checkpoint"
    if is_out_of_memory(error):
        return 2, f"too large for this machine: {error}".splitlines()[0]
    what = " ".join(str(error).split())[:300]
    return 1, f"unexpected {type(error).__name__}: {what} (LOPT_TRACEBACK=1 shows where)"
