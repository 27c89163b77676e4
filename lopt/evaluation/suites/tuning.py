"""Contenders tuned on a suite, and run at what they were tuned to: what the archive of the package is made by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lopt.evaluation.suites import choose_tasks
from lopt.evaluation.suites.archive import NUM_SEEDS, TUNED
from lopt.evaluation.suites.contenders import CONTENDERS
from lopt.evaluation.suites.judging import list_common, open_tuned
from lopt.evaluation.suites.search import Choice, Request, plan_judged, plan_tuning
from lopt.evaluation.suites.work import ALONE, OnRun, Share, carry_out


def tune_suite(
    suite: str,
    *,
    tasks: Sequence[str] | None = None,
    contenders: Sequence[str] | None = None,
    num_seeds: int = NUM_SEEDS,
    folder: Path = TUNED,
    workers: int = 1,
    share: Share = ALONE,
    on_run: OnRun | None = None,
    command: str = "",
) -> None:
    """Tune contenders on the tasks of a suite, then make their judged runs; what is archived is not run again.

    Runs at one rate for all tasks are made as soon as the development suite is tuned; give the command again for them.

    Args:
        tasks, contenders: names of some; by default all.
        num_seeds: judged runs of each.
        folder: of the archive, which has a folder for each suite.
        workers: processes.
        share: of the runs, under torchrun.
        on_run: called after every run.
        command: that makes the runs, kept beside them.
    Raises:
        ValueError: no such suite or task, or a damaged archive.
        OSError: the archive cannot be written.
    """
    chosen, names = choose_tasks(suite, list(tasks or ())), list(contenders or CONTENDERS)
    archive = open_tuned(suite, folder, command, share.part)
    common: list[dict[str, Choice]] = []

    def plan() -> list[Request]:
        if searches := plan_tuning(archive, chosen, names):
            return searches
        # Looked up once: by now it cannot change any more.
        if not common:
            common.append({name: choice for name, choice in list_common(folder).items() if name in names})
        return plan_judged(archive, chosen, names, common[0], num_seeds)

    carry_out(plan, archive, workers, share, on_run)
    if share.rank == 0 and share.size > 1:
        for task in chosen:
            archive.merge(task)
