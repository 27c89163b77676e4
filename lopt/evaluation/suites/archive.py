"""Runs on disk: a JSON file per task, replaced as a whole after every run, so that work may be stopped at any time.

What is archived is not run again. The file says what the task started from when it was made; runs of a task that has
changed since are noticed, and not used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lopt.core.files import write_atomic
from lopt.core.schema import conform
from lopt.evaluation.suites.contenders import CONTENDERS
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.task import Start, SuiteTask

FORMAT = 1
"""Of a task's file; raised when a figure of a run changes its meaning."""
NUM_SEEDS = 3
"""Judged runs of every optimizer, by default: the seeds 0, 1, 2."""
TUNED = Path(__file__).parent / "tuned"
"""The archive of the package: baselines, tuned, and their judged runs."""

logger = logging.getLogger(__name__)


class Archive:
    """The runs in a folder, of any tasks.

    Several processes may add runs, each under a `part` of its own; all see all runs that there were when they opened
    the archive.

    Args:
        folder: made with the first run.
        command: that makes the runs, kept beside them.
        part: of this process; "" for the only one.
    """

    def __init__(self, folder: Path, command: str = "", part: str = "") -> None:
        self.folder, self.command, self.part = folder, command, part
        self._runs: dict[str, list[Run]] = {}
        self._own: dict[str, list[Run]] = {}

    def list_runs(self, task: SuiteTask) -> list[Run]:
        """The runs of a task; none where its archived start is not that of the task as it is now, with a warning.

        Raises:
            ValueError: a file is no archive of runs.
        """
        if task.name not in self._runs:
            self.read(task)
        return self._runs[task.name]

    def find(self, task: SuiteTask, label: str, schedule: str, lr: float, seed: int) -> Run | None:
        """The run of an optimizer with a seed, if there is one."""
        for run in self.list_runs(task):
            if (run.label, run.schedule, run.lr, run.seed) == (label, schedule, lr, seed):
                return run
        return None

    def add(self, task: SuiteTask, run: Run) -> None:
        """Keep a run: it is on disk when this returns.

        Raises:
            OSError: the folder cannot be written.
        """
        self.list_runs(task).append(run)
        own = self._own[task.name]
        own.append(run)
        head = {"format": FORMAT, "task": task.title, "command": self.command, "start": compute_start(task)._asdict()}
        head["recipes"] = _list_recipes(own)
        lines = ",\n".join(json.dumps(asdict(run), allow_nan=False) for run in own)
        text = f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n'
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{task.name}{self.part}.json", text.encode())

    def read(self, task: SuiteTask) -> None:
        """Look at the disk again, for runs that other processes have added.

        Raises:
            ValueError: a file is no archive of runs.
        """
        own = f"{task.name}{self.part}.json"
        self._runs[task.name], self._own[task.name] = [], []
        for path in sorted({*self.folder.glob(f"{task.name}.json"), *self.folder.glob(f"{task.name}@*.json")}):
            try:
                start, recipes, runs = _read_file(path)
            except FileNotFoundError:  # the first rank has just merged the parts
                continue
            if not start.resembles(compute_start(task)):
                logger.warning(
                    "%s was made of another version of %s (%s, now %s); its runs are not used",
                    *(path, task.name, start, compute_start(task)),
                )
                continue
            old = sorted(recipes.items() - _list_recipes(runs).items())
            if old:
                logger.warning("%s has runs of optimizers as they were (%s); they are not used", path, old)
                runs = [run for run in runs if run.label not in dict(old)]
            self._runs[task.name] += runs
            if path.name == own:
                self._own[task.name] += runs

    def merge(self, task: SuiteTask) -> None:
        """Bring the parts of all processes into one file, when they have ended."""
        self.read(task)
        parts = list(self.folder.glob(f"{task.name}@*.json"))
        if parts:
            whole = Archive(self.folder, self.command)
            runs = self.list_runs(task)
            whole._runs[task.name], whole._own[task.name] = runs[:-1], runs[:-1]
            whole.add(task, runs[-1])
            for path in parts:
                path.unlink()


@cache
def compute_start(task: SuiteTask) -> Start:
    """What a task starts from, as computed once in a process."""
    return task.start()


def _list_recipes(runs: Sequence[Run]) -> dict[str, str]:
    """How the contenders of runs are made, by label."""
    labels = sorted({run.label for run in runs} & CONTENDERS.keys())
    return {label: CONTENDERS[label].recipe.describe() for label in labels}


def _read_file(path: Path) -> tuple[Start, dict[str, str], list[Run]]:
    try:
        content: dict[str, Any] = conform(json.loads(path.read_text()), dict[str, Any], "file")
        if content.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {content.get('format')!r}")
        runs = [Run(**conform(run, dict[str, Any], "run")) for run in content["runs"]]
        return Start(**content["start"]), conform(content["recipes"], dict[str, str], "recipes"), runs
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is no archive of runs ({error}); remove it to run them again") from error
