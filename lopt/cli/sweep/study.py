"""A sweep's study: Optuna's trials in a journal in the sweep's folder, which any number of processes work on.

Processes, on one machine or on several that share the folder, claim a trial at a time: one that an interrupted process
has left, or a new one. Whoever runs a trial holds the lock of its run's folder; so a trial that is called running while
its folder is free has lost its process, and goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.pruners import HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from lopt.cli.sweep.space import decode, list_ends, parse_space
from lopt.core.random import derive_seeds
from lopt.meta.runs.lock import hold_folder

JOURNAL, STUDY, PLAN = "journal.log", "sweep", "plan"
WORKERS = "workers"
"""The attribute of a trial that names the processes which had it, in their order."""
STATUS = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "asha", "hyperband")
FACTOR = 3
"""Of the trials at a rung of a pruner one in so many goes on to the next, which is so much later."""


class Report(NamedTuple):
    """How far a trial got: the folder of its run, one of `STATUS`, its settings by dotted key, the step of its last
    validation, the best one so far (None before the first), and why it failed, "" for not.
    """

    name: str
    status: str
    settings: dict[str, Any]
    step: int
    best: float | None
    error: str


class Claim(NamedTuple):
    """A trial of Optuna that this process is to run, the folder of its run, and the lock of that until it is closed."""

    trial: optuna.Trial
    name: str
    held: ExitStack


class SweepStudy:
    """The study in a sweep's folder.

    Args:
        folder: that exists.
        plan: of a new sweep: `command`, `config` (of the preset, plain), `vary` (texts for `parse_space`), `trials` (to
            make, those that fail among them), `sampler`, `pruner`, `first_rung` (outer steps before which no trial is
            pruned) and `average` (whether the mean of all is kept). None: that of the journal.
    Raises:
        FileNotFoundError: there is no sweep in the folder.
    """

    def __init__(self, folder: Path, plan: dict[str, Any] | None = None) -> None:
        journal = folder / JOURNAL
        if plan is None and not journal.is_file():
            raise FileNotFoundError(f"there is no sweep in {folder} (no {JOURNAL})")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # By default the lock is a link, which works on old network file systems, too; Windows has none.
        lock = JournalFileOpenLock(str(journal)) if sys.platform == "win32" else None
        storage = JournalStorage(JournalFileBackend(str(journal), lock))
        self.folder, self.study = folder, optuna.create_study(study_name=STUDY, storage=storage, load_if_exists=True)
        if plan is not None:
            self.study.set_user_attr(PLAN, plan)
        if PLAN not in self.study.user_attrs:
            raise ValueError(f"{journal} has no plan: its sweep was killed as it began. Remove it and begin again")
        self.plan: dict[str, Any] = self.study.user_attrs[PLAN]
        self.space = parse_space(self.plan["vary"])
        self.steps, first = self.plan["config"]["trainer"]["steps"], self.plan["first_rung"]
        self.study.pruner = {
            "none": NopPruner(),
            "asha": SuccessiveHalvingPruner(min_resource=first, reduction_factor=FACTOR),
            "hyperband": HyperbandPruner(min_resource=first, max_resource=self.steps, reduction_factor=FACTOR),
        }[self.plan["pruner"]]

    def claim(self) -> Claim | None:
        """A trial for this process, or None where no more is to be begun.

        One process at a time asks, so that the sampler's draws are named by the number of the trial.
        """
        with hold_folder(self.folder, patient=True):
            for found in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                held = self._hold(found)
                # Its process may have come to its end in between.
                if held and self.study.get_trials(deepcopy=False)[found.number].state == TrialState.RUNNING:
                    return self._take(self._complete(found), held)
                if held:
                    held.close()
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not waiting and len({name_run(trial) for trial in trials}) >= self.plan["trials"]:
                return None
            self.study.sampler = self._make_sampler(len(trials))
            asked = self.study.ask(fixed_distributions=self.space)
            # Grids want to end a loop of Optuna's when they are told of their last point, and there is none.
            self.study.sampler = RandomSampler()
            held = self._hold(asked)
            assert held is not None
            return self._take(asked, held)

    def _hold(self, trial: optuna.Trial | FrozenTrial) -> ExitStack | None:
        """The lock of a trial's folder, if no process has it."""
        folder, held = self.folder / name_run(trial), ExitStack()
        folder.mkdir(exist_ok=True)
        try:
            held.enter_context(hold_folder(folder))
        except ValueError:
            return None
        return held

    def _take(self, trial: optuna.Trial, held: ExitStack) -> Claim:
        trial.set_user_attr(WORKERS, [*trial.user_attrs.get(WORKERS, ()), name_worker(os.getpid())])
        return Claim(trial, name_run(trial), held)

    def _complete(self, found: FrozenTrial) -> optuna.Trial:
        """A trial that has lost its process, with all its settings: it may have been killed before it had them."""
        self.study.sampler = self._make_sampler(found.number)
        trial = optuna.Trial(self.study, found._trial_id)
        for key, kind in self.space.items():
            trial._suggest(key, kind)
        self.study.sampler = RandomSampler()
        return trial

    def _make_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """The sampler for one trial; a grid is one order of its points, others draw anew each time."""
        name, trials, seed = self.plan["sampler"], self.plan["trials"], self.plan["config"]["trainer"]["seed"]
        if name == "grid":
            return GridSampler({key: list_ends(kind) for key, kind in self.space.items()}, seed=seed)
        seed = int(derive_seeds(seed, "sweep", number)) % 2**32
        if name == "random":
            return RandomSampler(seed=seed)
        # Optuna's own ten draws at first would be most of a small sweep.
        first = min(10, max(4, trials // 4))
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=first)

    def fail(self, trial: optuna.Trial | FrozenTrial, error: str) -> None:
        """Record that a trial has failed, and why, in a line."""
        optuna.Trial(self.study, trial._trial_id).set_user_attr("error", error)
        self.study.tell(trial.number, state=TrialState.FAIL)

    def fail_worker(self, pid: int, error: str) -> bool:
        """Record that a process of this machine has died: its trial fails, unless another one has gone on with it.

        Returns:
            Whether it ever had a trial.
        """
        # Nobody claims a trial at the same time, who would run one that has failed.
        with hold_folder(self.folder, patient=True):
            had = [
                (trial, workers)
                for trial in self.study.get_trials(deepcopy=False)
                if name_worker(pid) in (workers := trial.user_attrs.get(WORKERS, ()))
            ]
            for trial, workers in had:
                if trial.state == TrialState.RUNNING and workers[-1] == name_worker(pid):
                    self.fail(trial, error)
        return bool(had)

    def retry_failed(self) -> None:
        """Have the trials that failed tried again, in the same folders: they may have lacked memory or disk."""
        with hold_folder(self.folder, patient=True):
            for name, trial in self._list_last().items():
                if trial.state == TrialState.FAIL:
                    self.study.enqueue_trial(trial.params, user_attrs={"run": name})

    def list_reports(self) -> list[Report]:
        """How far each trial got, in the order in which they began; of one that was tried again the last try."""
        reports = []
        for name, trial in self._list_last().items():
            step, settings = trial.last_step, decode(trial.params)
            best = None if step is None else trial.intermediate_values[step]  # what is reported is the best so far
            error = trial.user_attrs.get("error", "")
            reports.append(Report(name, STATUS[trial.state.name], settings, step or 0, best, error))
        return reports

    def _list_last(self) -> dict[str, FrozenTrial]:
        return {name_run(trial): trial for trial in self.study.get_trials(deepcopy=False)}


def name_run(trial: optuna.Trial | FrozenTrial) -> str:
    """The folder of a trial's run; a second try has that of the first."""
    return str(trial.user_attrs.get("run", f"trial-{trial.number:03}"))


def name_worker(pid: int) -> str:
    """How the journal calls a process of this machine."""
    return f"{platform.node()}:{pid}"
