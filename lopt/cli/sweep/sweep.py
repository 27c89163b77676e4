"""Sweeps: a preset meta-trained with several settings in worker processes; the rule that validates best is kept.

A trial is an ordinary run in a folder of its own, of one thread. `sweep.json` beside the trials says what they are and
how far they got. A trial ends with the sweep's own process, even one that is killed, and saves its state first; it
goes on from there when the sweep does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.cli.sweep.trials import Trial, check_config, draw_settings, make_config, parse_range, read_outcome
from lopt.cli.sweep.workers import Outcome, Worker, start_workers
from lopt.core.documents import read_json, to_json
from lopt.core.files import write_atomic
from lopt.core.schema import conform
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import read_command
from lopt.meta.runs.lock import hold_folder
from lopt.meta.trainer.checkpoint import RULE
from lopt.meta.trainer.stop import Stop
from lopt.meta.trainer.trainer import Interrupted
from lopt.rules.files import load

if TYPE_CHECKING:
    from rich.console import Console

SWEEP = "sweep.json"


@dataclass
class SweepState:
    """What `sweep.json` holds: enough to go on with a sweep after any end.

    Attributes:
        command: that made it.
        config: of the preset; a trial's settings are changes to it.
        halve_every: outer steps between halvings, 0 for none; of trials that are left when it comes, the worse half
            ends.
        trials: in the order in which they begin.
        halvings: that were made.
        best: name of the trial whose rule is kept.
    """

    command: str
    config: dict[str, Any]
    halve_every: int
    trials: list[Trial]
    halvings: int = 0
    best: str = ""


@dataclass
class Sweep:
    """A sweep in a folder, which `start_sweep` or `resume_sweep` makes.

    Attributes:
        folder: one folder for each trial in it, and `sweep.json`, which is written after every change.
        state: how far it got.
        rule_path: where the best rule is copied to.
    """

    folder: Path
    state: SweepState
    rule_path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rule_path = self.folder / RULE

    def run(self, workers: int, on_end: Callable[[Trial], None] | None = None) -> Trial:
        """Run all trials to their end, `workers` at a time, and return the best one; its rule is then at `rule_path`.

        Trials that failed are tried again, from their last checkpoint.

        Args:
            on_end: called for a trial that has come to its end, to a halving, or has failed.
        Raises:
            Interrupted: a signal (SIGINT, SIGTERM) arrived; the trials have saved their states.
            ValueError: another process runs the sweep, or no trial came to its end.
        """
        stop = Stop()
        # What failed may have failed for want of memory or disk: it is tried again.
        for trial in self.state.trials:
            if trial.status == "failed":
                trial.status, trial.error = "waiting", ""
        with hold_folder(self.folder), stop.on_signals(), start_workers(workers) as idle:
            while waiting := [trial for trial in self.state.trials if trial.status == "waiting"]:
                # All trials come to the next halving before any goes beyond it; the last one left runs to its end.
                until = self.state.halve_every * (self.state.halvings + 1) if len(waiting) > 1 else 0
                queue = [trial for trial in waiting if not until or trial.step < until]
                if queue:
                    self._run_round(queue, until, idle, stop, on_end)
                else:
                    self._halve(waiting)
                if stop.asked:
                    raise Interrupted
            return self._keep_best(on_end)

    def measure_progress(self) -> tuple[float, str]:
        """The share of all outer steps that are made, or need not be made, and the trials that have ended, in words."""
        trials, steps = self.state.trials, parse_config(self.state.config).trainer.steps
        ended = [trial for trial in trials if trial.status != "waiting"]
        made = sum(min(trial.step, steps) for trial in trials if trial.status == "waiting") + steps * len(ended)
        return made / (steps * len(trials)), f"{len(ended)} of {len(trials)} trials ended"

    def _run_round(
        self, queue: list[Trial], until: int, idle: list[Worker], stop: Stop, on_end: Callable[[Trial], None] | None
    ) -> None:
        """Run trials to step `until`, or (0) to their end, by the workers that are idle."""
        busy: dict[Connection, Worker] = {}
        terminated = False
        while busy or (queue and not stop.asked):
            while queue and idle and not stop.asked:
                worker, trial = idle.pop(), queue.pop(0)
                worker.begin(trial, make_config(self.state.config, trial), self.folder / trial.name, until)
                busy[worker.connection] = worker
            for connection in wait(list(busy), timeout=0.2):
                assert isinstance(connection, Connection)
                worker = busy.pop(connection)
                trial, outcome = worker.finish()
                self._take_result(trial, outcome, until, stop.asked)
                if on_end and (trial.status != "waiting" or trial.step == until):
                    on_end(trial)
                if not stop.asked:
                    idle.append(worker)
            if stop.asked and not terminated:
                terminated = True  # once: a second signal would end them without saving
                for worker in busy.values():
                    worker.process.terminate()

    def _take_result(self, trial: Trial, outcome: Outcome, until: int, asked: bool) -> None:
        """Record how far a trial got, and how it ended; one whose rule cannot be read has failed."""
        path = self.folder / trial.name / RULE
        if path.exists():
            try:
                read_outcome(trial, path)
            except (ValueError, OSError) as error:
                outcome = Outcome(False, f"{outcome.error}; {error}".removeprefix("; "))
        if outcome.arrived:
            trial.status = "waiting" if trial.step == until else "done"
        elif outcome.error and not asked:
            trial.status, trial.error = "failed", outcome.error
        self._write()

    def _halve(self, trials: Sequence[Trial]) -> None:
        """End the worse half of the trials that all have come to a halving."""
        for trial in sorted(trials, key=_rank)[math.ceil(len(trials) / 2) :]:
            trial.status = "halved"
        self.state.halvings += 1
        self._write()

    def _keep_best(self, on_end: Callable[[Trial], None] | None) -> Trial:
        """Copy the best rule that can be read."""
        ended = [trial for trial in self.state.trials if trial.status != "failed" and trial.best is not None]
        for best in sorted(ended, key=_rank):
            path = self.folder / best.name / RULE
            try:
                load(path)
            except (ValueError, OSError) as error:  # damaged since its trial has ended
                best.status, best.error = "failed", str(error)
                if on_end:
                    on_end(best)
                continue
            self.state.best = best.name
            write_atomic(self.rule_path, path.read_bytes())
            self._write()
            return best
        self._write()
        first = next((f"; {trial.name}: {trial.error}" for trial in self.state.trials if trial.error), "")
        raise ValueError(f"no trial of {self.folder} came to a rule that can be validated{first}")

    def _write(self) -> None:
        write_atomic(self.folder / SWEEP, to_json(asdict(self.state)))


def start_sweep(
    config: RunConfig, varied: Sequence[str], folder: Path, *, samples: int | None = None, halve_every: int = 0
) -> Sweep:
    """Make the folder of a new sweep, once all of its trials are known to be possible.

    Args:
        config: what the trials have in common.
        varied: texts for `parse_range`.
        samples: trials that are drawn, by the seed of `config`, spread evenly over each range; equal ones are tried
            once. None tries all combinations.
        halve_every: outer steps after which the worse half of the trials ends, again and again until one is left
            (successive halving: Jamieson & Talwalkar 2016, arXiv 1502.07943, with rounds of equal length); 0: never.
    Raises:
        FileExistsError: the folder holds a sweep already.
        ValueError: a text is not understood, or a setting is unknown, impossible, or one that trials must share.
    """

    def refuse_taken() -> None:
        if (folder / SWEEP).exists():
            raise FileExistsError(
                f"{folder} holds a sweep already: go on with --resume {folder}, or choose another --out"
            )

    refuse_taken()
    if halve_every % config.trainer.validate_every:
        raise ValueError(
            f"halving every {halve_every} steps needs validations at these steps: give a multiple of "
            f"trainer.validate_every = {config.trainer.validate_every}"
        )
    # All trials are drawn and built before the folder is made: a sweep begins as a whole or not at all.
    drawn = draw_settings([parse_range(text) for text in varied], samples, config.trainer.seed)
    digits = len(str(len(drawn) - 1))
    trials = [Trial(f"trial-{i:0{digits}}", settings) for i, settings in enumerate(drawn)]
    sweep = Sweep(folder, SweepState(read_command(), config.to_dict(), halve_every, trials))
    for trial in trials:
        check_config(make_config(sweep.state.config, trial))
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder):
        refuse_taken()  # another process may have been faster
        sweep._write()
    return sweep


def resume_sweep(folder: Path) -> Sweep:
    """A sweep where it was left, whether it was stopped, killed or finished; trials begin again at their last
    checkpoints.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: its file is damaged.
    """
    path = folder / SWEEP
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep in {folder} (no {SWEEP})")
    return Sweep(folder, conform(read_json(path), SweepState, ""))


def print_trials(state: SweepState, console: Console) -> None:
    """Print a table of all trials, the best first, with the settings in which they differ, the best validation and its
    step, how far they got, and how they ended; the one whose rule is kept is bold.
    """
    from rich.markup import escape
    from rich.table import Table

    metric = parse_config(state.config).trainer.validation_metric
    table = Table(box=None, pad_edge=False)
    for column in ("trial", *state.trials[0].settings, f"best {metric}", "at step", "steps", ""):
        table.add_column(escape(column), justify="left" if column in ("trial", "") else "right")
    for trial in sorted(state.trials, key=_rank):
        best = "-" if trial.best is None else f"{trial.best:.4g}"
        cells = [trial.name, *map(str, trial.settings.values()), best, str(trial.best_step), str(trial.step)]
        table.add_row(*map(escape, [*cells, trial.status]), style="bold" if trial.name == state.best else None)
    console.print(table)


def _rank(trial: Trial) -> tuple[bool, float]:
    """Sorts the best first, those that failed or have no figure last."""
    return trial.status == "failed" or trial.best is None, math.inf if trial.best is None else trial.best
