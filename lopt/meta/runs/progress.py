"""What a console shows of a run: what runs, a bar with speed and time left, or plain lines where there is no terminal,
and what came of it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from lopt.core.printing import say
from lopt.meta.runs.folder import resume_command
from lopt.meta.trainer.source import list_families
from lopt.meta.trainer.trainer import Progress, Trainer

FIRST_PERIOD, PERIOD = 5.0, 30.0
"""Seconds between plain lines: at first, and after some minutes."""


def tell_plan(trainer: Trainer, console: Console) -> None:
    """What will run: the rule, its families with their shares, and how the steps fit into memory."""
    several = len(trainer.sources) > 1
    say(console, trainer.rule.describe())
    for source in trainer.sources:
        share = f" ({source.name}: {source.tasks} tasks, {source.estimator.name}, weight {source.weight:g})"
        say(console, f"  on {source.family.describe()}{share if several else ''}")
        if getattr(source.estimator, "objective", "") == "baseline" and source.family.baseline is None:
            say(console, f"  {source.name}: objective 'baseline' takes tuned Adam on the family's default options")
    for plan in trainer.plans:
        say(console, f"  {plan}")


def tell_end(trainer: Trainer, console: Console) -> None:
    """Which of its three ends a run has come to, the last step, the end of the time, or no better validation for long;
    how good its best rule is, and where it lies.
    """
    steps, folder = trainer.config.steps, trainer.folder
    if not trainer.finished:
        hint = "" if folder is None else f"; go on with: {resume_command(folder)}"
        say(console, f"the time is over at step {trainer.step} of {steps}{hint}")
    elif trainer.step < steps:
        say(console, f"ended at step {trainer.step} of {steps}: {trainer.best.stale} validations without a better one")
    where = "" if folder is None else f"; {trainer.rule_path}"
    say(console, f"best on held-out tasks: {trainer.best.value:.4g} at step {trainer.best.step}{where}")


class PlainProgress:
    """How far something has come, as a line on the standard error every few seconds, and every `PERIOD` after some
    minutes: for logs of batch jobs, where nothing else is printed for long. A context manager.

    Args:
        console: where it is a terminal, or quiet, nothing is printed here.
        what: is done, such as "meta-training".
        done: share of it that is done already, from 0 to 1.
        clock: seconds from any moment on.
        file: the standard error by default.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        done: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        file: TextIO | None = None,
    ) -> None:
        self.shown = not (console.is_terminal or console.quiet)
        self.what, self.first, self.done, self.note = what, done, done, ""
        self.clock, self.began, self.file = clock, clock(), file
        self._over = threading.Event()

    def __enter__(self) -> PlainProgress:
        if self.shown:  # a thread, as one step of the work may take longer than a period
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def update(self, done: float, note: str) -> None:
        """Hear of progress, which the next line will tell.

        Args:
            done: share of all, from 0 to 1.
            note: where that is, in words.
        """
        self.done, self.note = done, note

    def describe(self) -> str:
        """The line: what has been done since when, and how long the rest takes at the speed so far."""
        elapsed, made = self.clock() - self.began, self.done - self.first
        left = f"about {_write_time(elapsed * (1 - self.done) / made)} left" if made > 0 else "time left unknown"
        note = f" ({self.note})" if self.note else ""
        return f"{self.what}: {self.done:.0%}{note}, {_write_time(elapsed)} so far, {left}"

    def _tell(self) -> None:
        while not self._over.wait(min(PERIOD, max(FIRST_PERIOD, (self.clock() - self.began) / 6))):
            print(self.describe(), file=self.file or sys.stderr, flush=True)


def _write_time(seconds: float) -> str:
    """Such as 0:05:30."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class TrainingProgress:
    """Progress of a meta-training run for people: a context manager whose `update` is a trainer's `on_step`.

    Args:
        console: a terminal gets a bar at its foot; a file or pipe gets the lines of validations, and plain progress.
        trainer: whose steps are shown, from where it stands.
    """

    def __init__(self, console: Console, trainer: Trainer) -> None:
        self.console = console
        self.bars = Bars(
            TextColumn("meta-training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  best {task.fields[best]}  {task.fields[speed]} inner steps/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        steps = trainer.config.steps
        self.task = self.bars.add_task("", total=steps, completed=trainer.step, loss="-", best="-", speed="-")
        self.plain = PlainProgress(console, "meta-training", trainer.step / steps)
        self.families = list_families(trainer.sources)
        self.speed = 0.0
        self.trouble = ""

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bars.start()
        self.plain.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.plain.__exit__(kind, error, trace)
        if self.console.is_terminal:
            self.bars.stop()

    def update(self, progress: Progress) -> None:
        """Show one outer step: the bar moves, and a validation prints a line that stays.

        Args:
            progress: what the trainer tells after every step; its speed is averaged over about ten steps.
        """
        self.plain.update(progress.step / progress.steps, f"step {progress.step}/{progress.steps}")
        if progress.metrics:
            now = progress.metrics["inner_steps_per_second"]
            self.speed = 0.9 * self.speed + 0.1 * now if self.speed else now
            loss, speed = f"{progress.metrics['loss']:.4f}", f"{self.speed:,.0f}"
            skipped = int(progress.metrics["skipped_slots"])
            self.trouble = f"  ({skipped} tasks not finite in this step)" if skipped else ""
            self.bars.update(self.task, completed=progress.step, loss=loss, speed=speed)
        if progress.validation:
            values = progress.validation
            self.bars.update(self.task, best=f"{values['best']:.4g}")
            trouble = self.trouble + "".join(
                f"  ({values[key]:.0f} held-out tasks {what})"
                for key, what in (("left_out", "are not finite without any step: left out"), ("diverged", "diverge"))
                if values[key]
            )
            figure = "loss" if len(self.families) == 1 else f"log(loss / first loss) of {len(self.families)} families"
            self.console.print(
                f"step {progress.step:>5}/{progress.steps}  held-out tasks: final {figure} {values['final']:.4g}, "
                f"mean {values['mean']:.4g}  (best {values['best']:.4g})  {self.speed:,.0f} inner steps/s"
                f"{trouble}",
                highlight=False,
                soft_wrap=True,
            )
