"""Worker processes of a sweep: they run trials one after the other, and end with the process that made them.

What goes wrong in a trial is how that trial ended, and nothing else: the sweep goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import optuna

from lopt.cli.sweep.space import make_config
from lopt.cli.sweep.study import Claim, SweepStudy
from lopt.meta.runs.folder import CONFIG, resume_run, start_run
from lopt.meta.runs.memory import explain_memory
from lopt.meta.trainer.trainer import Interrupted, Progress

OUTPUT = "output.txt"


def serve_trials(folder: str) -> None:
    """What a worker process does: run trials until none is left, a signal comes or the parent is gone.

    What they print is left in `OUTPUT` in the trial's folder.

    Args:
        folder: of the sweep.
    """
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent, which passes it on
    study = SweepStudy(Path(folder))
    while claim := study.claim():
        with claim.held, (study.folder / claim.name / OUTPUT).open("a", encoding="utf-8") as output:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(output.fileno(), stream.fileno())
            if not run_claim(study, claim):
                return


def run_claim(study: SweepStudy, claim: Claim) -> bool:
    """Run a trial to its end, or until it is pruned, and record how it ended; an exception ends the trial alone.

    Returns:
        False where a signal stopped it or the parent of this process is gone; its state is saved, and whoever claims
        the trial next goes on with it.
    """
    try:
        value = run_trial(study, claim)
    except Interrupted:
        return False
    except optuna.TrialPruned:
        study.study.tell(claim.trial, state=optuna.trial.TrialState.PRUNED)
    except Exception as error:
        traceback.print_exc()
        study.fail(claim.trial, f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        study.study.tell(claim.trial, value)
    return True


def run_trial(study: SweepStudy, claim: Claim) -> float:
    """Begin a trial's run, or go on with it from its last checkpoint; returns the best validation.

    Raises:
        Interrupted: a signal has stopped it, or the parent of this process is gone; its state is saved.
        TrialPruned: the study's pruner has ended it; it is saved, too, and `lopt train --resume` could go on with it.
    """
    parent = multiprocessing.parent_process()
    folder, trial, pruned = study.folder / claim.name, claim.trial, False
    config = make_config(study.plan["config"], claim.trial.params)
    trainer = resume_run(folder)[1] if (folder / CONFIG).exists() else start_run(config, folder)
    reported = max(study.study.get_trials(deepcopy=False)[trial.number].intermediate_values, default=-1)

    def watch(progress: Progress) -> None:
        nonlocal pruned
        if progress.validation and progress.step >= reported:  # others are of before an interruption
            if progress.step > reported:
                trial.report(trainer.best.value, progress.step)
            pruned = not trainer.finished and trial.should_prune()
        if pruned or (parent is not None and not parent.is_alive()):
            signal.raise_signal(signal.SIGTERM)  # the trainer saves its state before it ends

    try:
        with explain_memory(config.to_dict()):
            trainer.run(watch)
    except Interrupted:
        if pruned:
            raise optuna.TrialPruned from None
        raise
    return trainer.best.value
