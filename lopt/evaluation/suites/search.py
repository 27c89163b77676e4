"""How contenders are tuned and judged, as plans: which runs are missing, given those that are archived.

A learning rate is searched per task and schedule on a grid sqrt(10) apart, by the final training loss on seeds that are
not judged: the grid on one of them, extended while its edge is best, then the best `FINALISTS` on all. Judged are, on
the seeds from 0: every contender at what it was tuned to, every contender at one rate (and schedule) for all tasks,
the best of its grid on the development suite, and AdamW as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, inf, log
from typing import NamedTuple

from lopt.evaluation.statistics import average_middle
from lopt.evaluation.suites.archive import Archive
from lopt.evaluation.suites.contenders import CONTENDERS, DEFAULT, REFERENCES, rate
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.task import SuiteTask
from lopt.rules import Rule

TUNING_SEEDS = (1000, 1001)
FINALISTS = 2
EXPONENT_LIMIT = 16
"""Of sqrt(10), below and above 1: as far as a grid is extended."""


class Request(NamedTuple):
    """A run that is wanted.

    Attributes:
        task: its name.
        label: of the contender, or of the rule.
        schedule, lr, seed: of the run.
        rule: None for contenders.
    """

    task: str
    label: str
    schedule: str
    lr: float
    seed: int
    rule: Rule | None = None


class Choice(NamedTuple):
    """What a contender runs with.

    Attributes:
        label: of the contender.
        schedule, lr: as tuned.
        loss: final training loss in tuning, the geometric mean over seeds; infinite where a run diverged.
    """

    label: str
    schedule: str
    lr: float
    loss: float


# -- one search --------------------------------------------------------------------------------------------------------


def plan_search(archive: Archive, task: SuiteTask, name: str, schedule: str) -> list[Request]:
    """The runs that the search of a contender's learning rate still needs; they may be done in any order.

    Returns:
        [] when the search has ended.
    """
    rates = _Rates(archive, task, name, schedule)
    first, *others = TUNING_SEEDS

    def request(exponents: Sequence[int], seed: int) -> list[Request]:
        return [Request(task.name, name, schedule, rate(k), seed) for k in exponents if rates.find(k, seed) is None]

    if missing := request(CONTENDERS[name].list_exponents(), first):
        return missing
    low, high, best = min(rates.tried), max(rates.tried), rates.rank()[0]
    if CONTENDERS[name].low is not None:
        if (best == low or rates.score(best, [first]) == inf) and low > -EXPONENT_LIMIT:
            return request([low - 1], first)
        if best == high and high < EXPONENT_LIMIT:
            return request([high + 1], first)
    return [wanted for seed in others for wanted in request(rates.rank()[:FINALISTS], seed)]


def tune(archive: Archive, task: SuiteTask, name: str) -> Choice | None:
    """What a contender was tuned to on a task: its best learning rate and schedule.

    Returns:
        None if a search of it has not ended.
    """
    choices = []
    for schedule in CONTENDERS[name].schedules:
        if plan_search(archive, task, name, schedule):
            return None
        rates = _Rates(archive, task, name, schedule)
        finalists = [(rates.score(k, TUNING_SEEDS), k) for k in rates.rank()[:FINALISTS]]
        loss, exponent = min(finalists)
        choices.append(Choice(name, schedule, rate(exponent), loss))
    return min(choices, key=lambda choice: choice.loss)


def find_reference(archive: Archive, task: SuiteTask) -> Choice | None:
    """Tuned Adam or AdamW, whichever is better in tuning; None if one of them has not been tuned."""
    choices = [tune(archive, task, name) for name in REFERENCES]
    known = [choice for choice in choices if choice is not None]
    return min(known, key=lambda choice: choice.loss) if len(known) == len(choices) else None


class _Rates:
    """The runs of one contender with one schedule on one task, by exponent of the learning rate and seed."""

    def __init__(self, archive: Archive, task: SuiteTask, name: str, schedule: str) -> None:
        exponents = {rate(k): k for k in range(-EXPONENT_LIMIT, EXPONENT_LIMIT + 1)}
        self.runs: dict[tuple[int, int], Run] = {
            (exponents[run.lr], run.seed): run
            for run in archive.list_runs(task)
            if (run.label, run.schedule) == (name, schedule) and run.lr in exponents
        }

    @property
    def tried(self) -> list[int]:
        """Exponents that were run with the first tuning seed."""
        return [exponent for exponent, seed in self.runs if seed == TUNING_SEEDS[0]]

    def find(self, exponent: int, seed: int) -> Run | None:
        return self.runs.get((exponent, seed))

    def score(self, exponent: int, seeds: Sequence[int]) -> float:
        """Geometric mean of the final training loss; infinite where a run is missing or diverged."""
        losses = []
        for seed in seeds:
            run = self.find(exponent, seed)
            if run is None or run.diverged or run.train is None:
                return inf
            losses.append(log(max(run.train, 1e-30)))
        return exp(sum(losses) / len(losses))

    def rank(self) -> list[int]:
        """The best first, by the first tuning seed; ties go to the smaller learning rate."""
        return sorted(self.tried, key=lambda exponent: (self.score(exponent, TUNING_SEEDS[:1]), exponent))


# -- one rate for all tasks --------------------------------------------------------------------------------------------


def choose_common(archive: Archive, tasks: Sequence[SuiteTask], name: str) -> Choice | None:
    """The schedule and learning rate that a contender would have for all tasks: of its grid, the best over the
    development suite by the interquartile mean of the losses, each relative to tuned Adam's.

    Args:
        archive, tasks: of the development suite.
    Returns:
        None if a search on one of the tasks has not ended.
    """
    references = [find_reference(archive, task) for task in tasks]
    if not tasks or None in references or any(tune(archive, task, name) is None for task in tasks):
        return None
    choices = []
    for schedule in CONTENDERS[name].schedules:
        rates = [_Rates(archive, task, name, schedule) for task in tasks]
        for exponent in CONTENDERS[name].list_exponents():
            losses = [r.score(exponent, TUNING_SEEDS[:1]) for r in rates]
            ratios = [loss / ref.loss for loss, ref in zip(losses, references, strict=True) if ref is not None]
            choices.append(Choice(name, schedule, rate(exponent), average_middle(ratios)))
    return min(choices, key=lambda choice: (choice.loss, choice.lr))


# -- whole suites ------------------------------------------------------------------------------------------------------


def plan_tuning(archive: Archive, tasks: Sequence[SuiteTask], names: Sequence[str]) -> list[Request]:
    """What the searches of contenders on some tasks can run next; [] when all have ended."""
    return [
        request
        for task in tasks
        for name in names
        for schedule in CONTENDERS[name].schedules
        for request in plan_search(archive, task, name, schedule)
    ]


def plan_judged(
    archive: Archive, tasks: Sequence[SuiteTask], names: Sequence[str], common: Mapping[str, Choice], num_seeds: int
) -> list[Request]:
    """The judged runs of contenders that are missing, as far as their searches have ended.

    Args:
        common: what contenders have at one rate for all tasks, by label.
        num_seeds: judged are the seeds from 0.
    """
    requests: dict[Request, None] = {}
    for task in tasks:
        choices = [choice for name in names if (choice := tune(archive, task, name)) is not None]
        wanted = [choice[:3] for choice in [*choices, *common.values()]] + [DEFAULT]
        for label, schedule, lr in wanted:
            for seed in range(num_seeds):
                if archive.find(task, label, schedule, lr, seed) is None:
                    requests[Request(task.name, label, schedule, lr, seed)] = None
    return list(requests)
