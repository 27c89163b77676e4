"""Judging a rule on a suite: its runs and those of AdamW as it comes, made here, beside the archived contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lopt.evaluation.comparison import read_environment
from lopt.evaluation.suites import SUITES, choose_tasks
from lopt.evaluation.suites.archive import NUM_SEEDS, TUNED, Archive
from lopt.evaluation.suites.contenders import CONTENDERS, DEFAULT
from lopt.evaluation.suites.figures import Measured, Row, SuiteResult, compare_rows, summarize
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.search import Choice, Request, choose_common, find_reference, tune
from lopt.evaluation.suites.task import SuiteTask
from lopt.evaluation.suites.work import ALONE, OnRun, Share, carry_out, hide
from lopt.rules import Rule
from lopt.rules.files import fingerprint

DEVELOPMENT = "development"

Optimizer = tuple[str, str, float]
"""Label, schedule and learning rate, by which runs are archived."""
Find = Callable[[SuiteTask], Sequence[Run]]
"""The judged runs of an optimizer on a task; empty if one is missing."""


class Entrant(NamedTuple):
    """A rule whose runs are made here.

    Attributes:
        name: for readers.
        rule: as trained.
        hidden: some of `lopt.evaluation.suites.work.HIDEABLE`, which it is not told.
        lr: factor on its steps; 1 is as learned.
    """

    name: str
    rule: Rule
    hidden: tuple[str, ...] = ()
    lr: float = 1.0

    @property
    def label(self) -> str:
        """The name with what is not as usual."""
        return ", ".join(filter(None, [self.name, hide(self.hidden), "" if self.lr == 1 else f"lr {self.lr:g}"]))

    @property
    def optimizer(self) -> Optimizer:
        """What its runs are archived by: another rule of the same name does not get them."""
        return f"rule {fingerprint(self.rule)}", hide(self.hidden), self.lr


def open_tuned(suite: str, folder: Path = TUNED, command: str = "", part: str = "") -> Archive:
    """The archive of a suite's contenders, by default the package's."""
    return Archive(folder / suite, command, part)


def judge(
    entrants: Sequence[Entrant],
    suite: str,
    *,
    out: Path,
    tasks: Sequence[str] | None = None,
    num_seeds: int = NUM_SEEDS,
    workers: int = 1,
    share: Share = ALONE,
    tuned: Path = TUNED,
    on_run: OnRun | None = None,
    command: str = "",
    about: str = "",
    source: str = "",
) -> SuiteResult | None:
    """Train the tasks of a suite with rules, and with AdamW as it comes, and hold them against tuned contenders.

    Args:
        entrants: the rule that is judged, and others to compare it with.
        out: folder in which runs are kept as they end; those that are there are not made again.
        tasks: names of some of the suite's.
        workers: processes.
        share: of the runs, under torchrun.
        tuned: archive of the contenders.
        on_run: called after every run.
        command: that repeats it.
        about, source: what the first rule is, in a line, and the name or path that it is loaded by.
    Returns:
        The figures; None on all ranks but the first.
    Raises:
        ValueError: no such suite or task, or a damaged archive.
        OSError: `out` cannot be written.
    """
    chosen = choose_tasks(suite, list(tasks or ()))
    rules: dict[Optimizer, Rule | None] = {DEFAULT: None} | {entrant.optimizer: entrant.rule for entrant in entrants}
    archive = Archive(out / "runs", command, share.part)

    def plan() -> list[Request]:
        return [
            Request(task.name, *optimizer, seed, rule)
            for task in chosen
            for seed in range(num_seeds)
            for optimizer, rule in rules.items()
            if archive.find(task, *optimizer, seed) is None
        ]

    carry_out(plan, archive, workers, share, on_run)
    if share.rank != 0:
        return None
    if share.size > 1:
        for task in chosen:
            archive.merge(task)
    contenders = Contenders(suite, chosen, num_seeds, tuned)
    rows = build_rows(entrants, archive, contenders)
    untuned = [task.name for task in chosen if not contenders.find_reference(task)]
    environment = read_environment()
    return SuiteResult(
        suite, num_seeds, rows, untuned, command=command, environment=environment, about=about, source=source
    )


def build_rows(entrants: Sequence[Entrant], archive: Archive, contenders: Contenders) -> list[Row]:
    """The figures of rules, of all contenders and of AdamW as it comes, all beside the first rule.

    Args:
        entrants: the rule that is judged, and others.
        archive: has the runs of the rules and of AdamW as it comes.
    """
    num_seeds = contenders.num_seeds
    default = {task.name: _find_seeds(archive, task, DEFAULT, num_seeds) for task in contenders.tasks}

    def measure(find: Find, timed: bool = False) -> list[Measured]:
        found = [(task, find(task)) for task in contenders.tasks]
        return [
            Measured(task.name, runs, contenders.find_reference(task), default[task.name], timed)
            for task, runs in found
            if runs
        ]

    def find(optimizer: Optimizer) -> Find:
        return lambda task: _find_seeds(archive, task, optimizer, num_seeds)

    rows = [
        summarize(entrant.label, "other" if i else "rule", measure(find(entrant.optimizer), True))
        for i, entrant in enumerate(entrants)
    ]
    for name, kind, find_runs in contenders.list_optimizers():
        if measured := measure(find_runs):
            rows.append(summarize(name, kind, measured))
    as_it_comes = f"{CONTENDERS[DEFAULT[0]].title} {DEFAULT[2]:g}"
    rows.append(summarize(as_it_comes, "default", measure(find(DEFAULT))))
    return [rows[0], *(replace(row, against=compare_rows(rows[0], row)) for row in rows[1:])]


class Contenders:
    """What is archived of the contenders of a suite.

    Args:
        suite: its name.
        tasks: of it, those that are judged.
        num_seeds: judged runs that a contender needs to count.
        folder: of the archive.
    """

    def __init__(self, suite: str, tasks: Sequence[SuiteTask], num_seeds: int, folder: Path = TUNED) -> None:
        self.archive, self.tasks, self.num_seeds = open_tuned(suite, folder), tasks, num_seeds
        self.common = list_common(folder)

    def find_reference(self, task: SuiteTask) -> list[Run]:
        """The judged runs of tuned Adam or AdamW; [] if they are not all archived."""
        choice = find_reference(self.archive, task)
        return [] if choice is None else _find_seeds(self.archive, task, choice[:3], self.num_seeds)

    def list_optimizers(self) -> list[tuple[str, str, Find]]:
        """Label, kind and judged runs of what there is: the best of all tuned, all tuned, and all at one rate."""
        rows: list[tuple[str, str, Find]] = [("best of all tuned", "tuned", self._find_best)]
        for name, contender in CONTENDERS.items():
            kind = "tuned" if contender.low is not None else "default"
            rows.append((contender.title, kind, lambda task, name=name: self._find_tuned(task, name)))  # type: ignore[misc]
        for name, choice in self.common.items():
            if CONTENDERS[name].low is not None:
                label = f"{CONTENDERS[name].title} {choice.lr:g} {choice.schedule}"
                rows.append((label, "one rate", lambda task, c=choice: self._find(task, c)))  # type: ignore[misc]
        return rows

    def _find(self, task: SuiteTask, choice: Choice) -> list[Run]:
        return _find_seeds(self.archive, task, choice[:3], self.num_seeds)

    def _find_tuned(self, task: SuiteTask, name: str) -> list[Run]:
        choice = tune(self.archive, task, name)
        return [] if choice is None else self._find(task, choice)

    def _find_best(self, task: SuiteTask) -> list[Run]:
        choices = [tune(self.archive, task, name) for name in CONTENDERS]
        known = [choice for choice in choices if choice is not None]
        if len(known) < len(CONTENDERS):
            return []
        return self._find(task, min(known, key=lambda choice: choice.loss))


def list_common(folder: Path = TUNED) -> dict[str, Choice]:
    """What every contender has at one rate for all tasks, as far as the development suite is tuned."""
    archive, tasks = open_tuned(DEVELOPMENT, folder), SUITES[DEVELOPMENT]
    choices = {name: choose_common(archive, tasks, name) for name in CONTENDERS}
    return {name: choice for name, choice in choices.items() if choice is not None}


def _find_seeds(archive: Archive, task: SuiteTask, optimizer: Optimizer, num_seeds: int) -> list[Run]:
    runs = [archive.find(task, *optimizer, seed) for seed in range(num_seeds)]
    found = [run for run in runs if run is not None]
    return found if len(found) == num_seeds else []
