"""Sweeps: a preset meta-trained with several settings in worker processes; the rule that validates best is kept, or the
mean of all.

A trial is an ordinary run in a folder of its own, of one thread. `journal.log` beside the trials, which is Optuna's,
says what the sweep is and what has become of each.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution

from lopt.cli.sweep.space import check_space, list_ends, parse_space
from lopt.cli.sweep.study import JOURNAL, PRUNERS, SAMPLERS, Report, SweepStudy
from lopt.cli.sweep.workers import serve_trials
from lopt.core.files import write_atomic
from lopt.core.names import choose
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import read_command
from lopt.meta.runs.lock import hold_folder
from lopt.meta.trainer.checkpoint import RULE
from lopt.meta.trainer.stop import Stop
from lopt.meta.trainer.trainer import Interrupted
from lopt.rules.average import average_cards, average_rules
from lopt.rules.files import load, load_card, save

if TYPE_CHECKING:
    from rich.console import Console

ENDED = ("done", "pruned", "failed")
POLL = 0.5
"""Seconds between looks at the journal."""


class Sweep:
    """A sweep in a folder.

    Args:
        study: what its trials are, and how far they got.

    Attributes:
        rule_path: where the best rule is copied to, or the mean is written.
    """

    def __init__(self, study: SweepStudy) -> None:
        self.folder, self.study, self.rule_path = study.folder, study, study.folder / RULE

    def run(self, workers: int, on_end: Callable[[Report], None] | None = None) -> Report:
        """Run trials, `workers` at a time, until none is left to begin, and return the best one of all that have ended,
        whoever ran them; its rule, or the mean of all, is then at `rule_path`.

        Args:
            on_end: called for a trial that has come to its end, was pruned, or has failed.
        Raises:
            Interrupted: a signal (SIGINT, SIGTERM) arrived; the trials have saved their states.
            ValueError: no trial came to a rule (for a mean: fewer than two), or a worker has died before it had one.
        """
        stop, told = Stop(), {report.name for report in self.study.list_reports() if report.status in ENDED}
        running, terminated = [self._start() for _ in range(workers)], False
        with stop.on_signals():
            while running:
                wait([process.sentinel for process in running], timeout=POLL)
                for process in [process for process in running if not process.is_alive()]:
                    running.remove(process)
                    if process.exitcode and not stop.asked:
                        self._replace(process, running)
                if stop.asked and not terminated:
                    terminated = True  # once: a second signal would end them without saving
                    for process in running:
                        process.terminate()
                for report in self.study.list_reports():
                    if on_end and report.status in ENDED and report.name not in told:
                        told.add(report.name)
                        on_end(report)
        if stop.asked:
            raise Interrupted
        return self.keep_rule()

    def _start(self) -> Any:
        # torch's threads do not survive a fork.
        process = multiprocessing.get_context("spawn").Process(target=serve_trials, args=(str(self.folder),))
        process.daemon = True
        process.start()
        return process

    def _replace(self, process: Any, running: list[Any]) -> None:
        """A worker in the place of one that has died, whose trial has failed."""
        code = process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        if not self.study.fail_worker(process.pid, f"its process {how}"):
            for other in running:
                other.terminate()
            raise ValueError(f"a worker of {self.folder} {how} before it had a trial")
        running.append(self._start())

    def measure_progress(self) -> tuple[float, str]:
        """The share of all outer steps that are made, or need not be made, and the trials that have ended, in words."""
        reports, steps, trials = self.study.list_reports(), self.study.steps, self.study.plan["trials"]
        ended = sum(report.status in ENDED for report in reports)
        made = sum(steps if report.status in ENDED else report.step for report in reports)
        return made / (steps * trials), f"{ended} of {trials} trials ended"

    def keep_rule(self) -> Report:
        """Keep the best rule that can be read, or the mean of all that can, and return the best trial.

        Raises:
            ValueError: there is none, or only one for a mean.
        """
        with hold_folder(self.folder, patient=True):
            reports = sorted(self.study.list_reports(), key=rank)
            errors = [f"{report.name}: {report.error}" for report in reports if report.error]
            readable = list[Report]()
            for report in reports:
                if report.status not in ("done", "pruned"):
                    continue
                try:
                    load(self.folder / report.name / RULE)
                except (ValueError, OSError) as error:  # damaged since its trial has ended
                    errors.insert(0, str(error))
                    continue
                readable.append(report)
            average = self.study.plan["average"]
            running = any(report.status == "running" for report in reports)  # elsewhere, where the mean will be made
            if len(readable) > (average and not running):
                self._write([self.folder / report.name / RULE for report in readable][: None if average else 1])
                return readable[0]
        wanted = "only one trial" if readable else "no trial"
        raise ValueError("; ".join([f"{wanted} of {self.folder} came to a rule that can be validated", *errors[:1]]))

    def _write(self, paths: Sequence[Path]) -> None:
        """Keep a rule file as it is, or the mean of several."""
        if len(paths) == 1:
            write_atomic(self.rule_path, paths[0].read_bytes())
        else:
            mean = average_rules([load(path) for path in paths])
            save(mean, self.rule_path, average_cards([load_card(path) for path in paths]))

    def describe(self, best: Report) -> str:
        """The sweep as JSON: its plan, all trials, the name of the best one and where its rule is."""
        trials = [report._asdict() for report in self.study.list_reports()]
        found = {**self.study.plan, "trials": trials, "best": best.name, "rule": str(self.rule_path)}
        return json.dumps(found, indent=2)


def start_sweep(
    config: RunConfig,
    vary: Sequence[str],
    folder: Path,
    *,
    trials: int | None = None,
    sampler: str = "",
    pruner: str = "none",
    first_rung: int = 0,
    average: bool = False,
) -> Sweep:
    """Make the folder of a new sweep, once all choices and bounds are known to be possible.

    Args:
        config: what the trials have in common.
        vary: texts for `parse_space`.
        trials: to make; all combinations of choices by default.
        sampler: name in `SAMPLERS`; "grid" without `trials`, else "tpe".
        pruner: name in `PRUNERS`.
        first_rung: outer step before which no trial is pruned; 0: that of the first validation after a ninth of them.
        average: keep the mean of all trials' rules, not the best one.
    Raises:
        FileExistsError: the folder holds a sweep already.
        ValueError: a text is not understood, or a setting is unknown, impossible, or one that trials must share.
    """

    def refuse_taken() -> None:
        if (folder / JOURNAL).exists():
            raise FileExistsError(
                f"{folder} holds a sweep already: go on with --resume {folder}, or choose another --out"
            )

    refuse_taken()
    space = parse_space(vary)
    ranges = [key for key, kind in space.items() if not isinstance(kind, CategoricalDistribution)]
    sampler = sampler or ("tpe" if trials else "grid")
    choose("--sampler", sampler, SAMPLERS)
    choose("--pruner", pruner, PRUNERS)
    if ranges and (sampler == "grid" or not trials):
        raise ValueError(f"{ranges[0]} is a range, which has no grid: say how many trials are to be made (--trials)")
    combinations = math.prod(len(list_ends(kind)) for kind in space.values())
    trials = min(trials or combinations, combinations) if sampler == "grid" else trials or combinations
    steps, every = config.trainer.steps, config.trainer.validate_every
    if first_rung and (pruner == "none" or not 0 < first_rung <= steps):
        raise ValueError(f"--first-rung is a step of 1 to {steps}, for --pruner asha or hyperband, got {first_rung}")
    if average and (trials < 2 or pruner != "none"):
        raise ValueError(f"--average is of two trials or more, all to their ends, got {trials} and --pruner {pruner}")
    if average and (kinds := [key for key in space if key == "rule" or key.startswith("rule.")]):
        raise ValueError(f"--average is of rules with equal options: {kinds[0]} cannot vary")
    first_rung = first_rung or min(steps, every * math.ceil(steps / 9 / every))
    check_space(config.to_dict(), space)
    plan = {"command": read_command(), "config": config.to_dict(), "vary": list(vary), "trials": trials}
    plan |= {"sampler": sampler, "pruner": pruner, "first_rung": first_rung, "average": average}
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder):
        refuse_taken()  # another process may have been faster
        return Sweep(SweepStudy(folder, plan))


def resume_sweep(folder: Path) -> Sweep:
    """A sweep to go on with, or to join: whether it was stopped, killed or finished, or runs in other processes.

    Trials that were interrupted go on from their last checkpoints, those that failed are tried again.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: its file is damaged.
    """
    study = SweepStudy(folder)
    study.retry_failed()
    return Sweep(study)


def print_trials(reports: Sequence[Report], best: Report, metric: str, console: Console) -> None:
    """Print a table of all trials, the best first, with the settings in which they differ, the best validation, how far
    they got, and how they ended; the best one is bold.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("trial", *reports[0].settings, f"best {metric}", "steps", ""):
        table.add_column(escape(column), justify="left" if column in ("trial", "") else "right", overflow="fold")
    for report in sorted(reports, key=rank):
        figure = "-" if report.best is None else f"{report.best:.4g}"
        settings = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in report.settings.values())
        cells = [report.name, *settings, figure, str(report.step), report.status]
        table.add_row(*map(escape, cells), style="bold" if report.name == best.name else None)
    console.print(table)


def rank(report: Report) -> tuple[bool, float]:
    """Sorts the best first, those that failed or have no figure last."""
    return report.status == "failed" or report.best is None, math.inf if report.best is None else report.best
