"""Three programs that show in half a minute what a rule does: images, text and a table, beside AdamW.

AdamW, as it comes and with a tuned learning rate, is taken from the archive of the package; the rule is trained here,
from the same initial weights and on the same batches. The programs are of the held-out suite: neither their data nor
their architectures were used to make the default rule. One seed of each shows, it does not judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lopt.evaluation.suites import find_task
from lopt.evaluation.suites.archive import Archive
from lopt.evaluation.suites.contenders import CONTENDERS, DEFAULT
from lopt.evaluation.suites.judging import Entrant, open_tuned
from lopt.evaluation.suites.runs import Run, train_task
from lopt.evaluation.suites.search import tune
from lopt.evaluation.suites.task import SuiteTask
from lopt.evaluation.suites.work import prepare_rule
from lopt.rules import Rule

SUITE = "heldout"
SHOWN = {
    "letters_resnet": "Images: a ResNet reads letters",
    "code_lstm": "Text: an LSTM writes Python",
    "diabetes_table": "Table: a transformer, diabetes",
}
SEED = 0

OnStep = Callable[[SuiteTask, int, float], None]
"""Hears of every step of the rule: the task, steps made, and the loss."""


class Shown(NamedTuple):
    """One program under three optimizers.

    Attributes:
        task: what was trained.
        title: for readers.
        rule: the run of the rule.
        default, tuned: recorded runs of AdamW with a learning rate of 1e-3, and with a tuned one.
    """

    task: SuiteTask
    title: str
    rule: Run
    default: Run
    tuned: Run

    def list_runs(self) -> list[Run]:
        """All three, the rule first."""
        return [self.rule, self.tuned, self.default]


def list_recorded() -> dict[str, tuple[Run, Run]]:
    """The runs of AdamW on every program that is shown: as it comes, and tuned.

    Raises:
        ValueError: the package's archive lacks one, or is damaged.
    """
    archive, found = open_tuned(SUITE), {}
    for name in SHOWN:
        task = find_task(name)
        choice = tune(archive, task, DEFAULT[0])
        runs = [archive.find(task, *key, SEED) for key in (DEFAULT, choice[:3])] if choice else []
        if len(runs) < 2 or runs[0] is None or runs[1] is None:
            raise ValueError(f"the package has no recorded runs of {CONTENDERS[DEFAULT[0]].title} on {name}")
        found[name] = (runs[0], runs[1])
    return found


def show_rule(name: str, rule: Rule, folder: Path, on_step: OnStep | None = None) -> Iterator[Shown]:
    """Train every program with a rule, as its users would, and hold it against what is recorded.

    Args:
        name: of the rule.
        rule: as trained.
        folder: where its runs are kept; those that are there are not made again.
        on_step: called after every step that is made.
    Returns:
        Each program, as soon as it is done.
    Raises:
        OSError: the folder cannot be written.
    """
    archive, optimizer = Archive(folder), Entrant(name, rule).optimizer
    for key, (default, tuned) in list_recorded().items():
        task = find_task(key)
        run = archive.find(task, *optimizer, SEED)
        if run is None:
            label, schedule, lr = optimizer
            tell = None if on_step is None else lambda step, loss, task=task: on_step(task, step, loss)
            run = train_task(task, SEED, prepare_rule(rule, lr), label=label, schedule=schedule, lr=lr, on_step=tell)
            archive.add(task, run)
        yield Shown(task, SHOWN[key], run, default, tuned)
