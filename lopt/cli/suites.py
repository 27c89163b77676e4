"""Rules judged on suites of tasks, with a line on the terminal that says how far it is, and counted on their cards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

import lopt
from lopt.cli.console import make_folder
from lopt.core.printing import say
from lopt.meta.runs.lock import hold_folder
from lopt.meta.runs.progress import PlainProgress

if TYPE_CHECKING:
    from lopt.evaluation.suites.figures import SuiteResult
    from lopt.evaluation.suites.judging import Entrant
    from lopt.evaluation.suites.runs import Run
    from lopt.evaluation.suites.search import Request
    from lopt.rules import Rule

HELDOUT = "heldout"
COUNTED = "heldout_runs"
"""Entry of a rule's card: how often it was judged on the held-out suite."""


def judge_on_suite(
    path: Path, entrants: Sequence[Entrant], suite: str, out: Path, console: Console, **options: Any
) -> SuiteResult | None:
    """Judge a rule on a suite, print the table, write the page; runs on the held-out suite are counted on its card.

    Args:
        path: of the first entrant's file; where there is none, or the file is the package's, the result alone counts.
        entrants: the rule that is judged, and others to compare it with.
        options: further arguments of `lopt.evaluation.suites.judging.judge`.
    Returns:
        The result; None on all ranks but the first.
    """
    from lopt.evaluation.report.suite import print_suite, write_suite
    from lopt.evaluation.suites.judging import judge
    from lopt.evaluation.suites.work import read_share

    share, counts, made = read_share(), suite == HELDOUT and keeps_count(path), []
    if counts and not os.access(path, os.W_OK):
        raise PermissionError(
            f"{path} cannot be written, but its card is to count how often it was judged on {HELDOUT}"
        )
    make_folder(out)
    # Ranks keep their runs in files of their own; another command would write into the same ones.
    alone = hold_folder(out) if share.rank == 0 else nullcontext()
    with alone, tell_runs(f"{entrants[0].label} on the {suite} suite", console) as tell:

        def on_run(request: Request, run: Run, missing: int) -> None:
            made.append(request)
            tell(request, run, missing)

        result = judge(entrants, suite, out=out, share=share, on_run=on_run, **options)
    if result is None:
        return None
    if suite == HELDOUT:
        result = replace(result, heldout_runs=count_heldout(path, entrants[0].rule))
    print_suite(result, console)
    if not made:
        say(console, f"all runs are those that were kept in {out / 'runs'}: remove it to have them made again")
    for name, written in write_suite(out, result).items():
        say(console, f"{name:>16}  {written}")
    return result


def count_heldout(path: Path, rule: Rule) -> int:
    """How often a rule was judged on the held-out suite, this time included; a rule file of the user's keeps the count.

    Raises:
        OSError: the file cannot be written.
    """
    # The card as it is in the file: what of it is not understood stays as it is.
    card = lopt.load_card(path) if path.is_file() else {}
    given = card.get(COUNTED, 0)
    count = (given if isinstance(given, int) else 0) + 1
    if keeps_count(path):
        lopt.save(rule, path, card | {COUNTED: count})
    return count


def keeps_count(path: Path) -> bool:
    """Whether a rule has a file of its user's, whose card can count."""
    from lopt.rules.files import PRETRAINED

    return path.is_file() and path.resolve().parent != PRETRAINED.resolve()


def count_workers(workers: int | None) -> int:
    """The processes that runs are shared out to: by default one for each core, or one alone in those of torchrun."""
    if workers is not None:
        return workers
    return 1 if "RANK" in os.environ else os.cpu_count() or 1


@contextmanager
def tell_runs(title: str, console: Console) -> Iterator[Callable[[Request, Run, int], None]]:
    """A line at the foot of a terminal that says which run has ended, how many are known to be left, and for how long;
    where there is no terminal, plain lines now and then.

    On Ctrl-C the process ends with status 130: the runs that have ended are kept, and the same command goes on with the
    others.
    """
    done = 0
    with console.status(escape(title)) as status, PlainProgress(console, title) as progress:

        def on_run(request: Request, run: Run, missing: int) -> None:
            nonlocal done
            done += 1
            what = "rule" if request.rule is not None else f"{request.label} {request.schedule} {request.lr:g}"
            loss = "diverged" if run.train is None else f"{run.train:.4g}"
            progress.update(done / (done + missing), f"{request.task}, {what}, seed {request.seed}: {loss}")
            status.update(escape(f"{progress.describe()}; {missing} more runs"))

        try:
            yield on_run
        except KeyboardInterrupt:
            say(console, "stopped; the runs that have ended are kept: give the same command to go on")
            sys.exit(130)
