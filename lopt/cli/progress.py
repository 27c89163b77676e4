"""What a terminal shows of a run: a bar with speed and time left, or plain lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from lopt.meta.trainer.source import list_families
from lopt.meta.trainer.trainer import Progress, Trainer


class TrainingProgress:
    """Progress of a meta-training run for people: a context manager whose `update` is a trainer's `on_step`.

    Args:
        console: a terminal gets a bar at its foot; a file or pipe gets the lines of validations alone.
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
        self.families = list_families(trainer.sources)
        self.speed = 0.0
        self.trouble = ""

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def update(self, progress: Progress) -> None:
        """Show one outer step: the bar moves, and a validation prints a line that stays.

        Args:
            progress: what the trainer tells after every step; its speed is averaged over about ten steps.
        """
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
