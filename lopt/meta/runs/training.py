"""A rule meta-trained: what `lopt train` runs, and its door for Python, `lopt.train`.

Both load a configuration, open a run, and train it on a console; what they share is here, what they print it on and
where it lies is theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.core.printing import make_console
from lopt.meta.config.load import Preset, load_config, parse_config
from lopt.meta.config.overrides import Change, list_changes
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import build_trainer, open_run, resume_command, resume_run
from lopt.meta.runs.memory import explain_memory
from lopt.meta.trainer.checkpoint import RULE
from lopt.meta.trainer.ranks import Ranks, join_ranks
from lopt.meta.trainer.trainer import Interrupted, Progress, Trainer
from lopt.rules import Rule
from lopt.rules.files import save

if TYPE_CHECKING:
    from rich.console import Console

OnStep = Callable[[Progress], None]


@dataclass(frozen=True)
class TrainedRule:
    """What a meta-training run came to.

    Attributes:
        rule: with the best weights that validation found; `lopt.LearnedOptimizer` takes it.
        card: what a file of it says: how it was trained, on what, and how good validation found it.
        config: of the run.
        step: outer steps that were made.
        best, best_step: the best figure on held-out tasks, of which lower is better, and the step that reached it.
        finished: whether the run made all of its steps, or ended as no validation was better for long.
        folder: of the run; None if nothing was kept.
    """

    rule: Rule = field(repr=False)
    card: dict[str, Any] = field(repr=False)
    config: RunConfig = field(repr=False)
    step: int
    best: float
    best_step: int
    finished: bool
    folder: Path | None

    @property
    def name(self) -> str:
        """What tables and pictures call the rule."""
        return self.config.name

    @property
    def rule_path(self) -> Path | None:
        """The rule's file in the run's folder; None without one."""
        return None if self.folder is None else self.folder / RULE

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the rule with its card to a file, which `lopt.load`, `lopt.LearnedOptimizer` and all commands take.

        Args:
            path: usually `*.safetensors`; its folder must exist.
        Raises:
            OSError: it cannot be written; what was there before is unchanged.
        """
        return save(self.rule, path, self.card)


def train(
    preset: Preset | None = None,
    /,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: str | None = None,
    time_limit: float | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    **overrides: Any,
) -> TrainedRule:
    """Meta-train a rule, as `lopt train` does; `lopt.evaluate` judges it.

    Under torchrun all processes make the same call, share the tasks, and get the same rule.

    >>> import lopt
    >>> tiny = dict(steps=2, tasks=2, validation_tasks=2, validation_steps=5)
    >>> trained = lopt.train("digits-lstm", rule=dict(hidden=4), trainer=tiny, width=5, progress=False)
    >>> trained.step, trained.rule.config["hidden"]
    (2, 4)

    Args:
        preset: a shipped one (`lopt list presets`), the path of a TOML file, nested dicts as in it, or a configuration.
        out: folder of a new run, with its checkpoints, logs and rule file; None keeps nothing on disk.
        resume: folder of a run to go on with, in the place of a preset.
        seed, device: short for `trainer=dict(seed=..., device=...)`; with `resume` only a device may be given.
        time_limit: seconds after which training ends with the best rule so far.
        progress: tell what runs, how far it is and how long it will take; needs the extra `train`.
        on_step: called after every outer step.
        overrides: settings that differ from the preset's: a section with what changes in it, `rule=dict(hidden=16)` or
            `trainer=dict(steps=500)`; an entry's name, `rule="small_fc"`; or an option of the task, `width=40`.
    Raises:
        ValueError: an unknown preset or setting, a value that does not fit, settings without effect, or a run that
            came to nothing: no finite meta-gradient for long, or a rule that diverges on all held-out tasks.
        FileNotFoundError: there is no such file, or no run to go on with.
        FileExistsError: `out` holds a run already.
        Interrupted: Ctrl-C or SIGTERM; the run is saved if it has a folder, and the message says how to go on.
    """
    changes = list_changes(overrides)
    changes += [(("trainer", key), value) for key, value in (("seed", seed), ("device", device)) if value is not None]
    if resume is not None and (preset is not None or out is not None or overrides or seed is not None):
        raise ValueError("train: resume takes its settings from the run: give nothing else but a device")
    if resume is None and preset is None:
        raise ValueError("train: expected a preset, a configuration or resume=FOLDER, got none of them")
    folder = None if out is None else Path(out)
    with ExitStack() as held:
        ranks = held.enter_context(join_ranks())
        if resume is not None:
            config, trainer = resume_run(Path(resume), ranks, device, held)
        else:
            assert preset is not None
            config, trainer = open_training(preset, changes, lambda _: folder, ranks, held, _describe_call(preset))
        run_trainer(trainer, make_console() if progress and ranks.leads else None, time_limit, on_step)
        return gather_result(config, trainer)


def open_training(
    preset: Preset,
    changes: Sequence[str | Change],
    place: Callable[[RunConfig], Path | None],
    ranks: Ranks,
    held: ExitStack,
    command: str | None = None,
) -> tuple[RunConfig, Trainer]:
    """Configuration and trainer of a new run, or of the one that torchrun has started again.

    Args:
        preset, changes: what `lopt.meta.config.load.load_config` makes a configuration of.
        place: the run's folder; None keeps nothing on disk.
        held: rank 0 keeps other processes out of the folder until this is closed.
        command: that begins the run; by default the command line's.
    Raises:
        FileExistsError: the folder holds another run.
        ValueError: something in the configuration is wrong, or another process has the folder.
        OSError: a file cannot be read, or the folder not be written.
        FailedLead: one of these on rank 0.
    """
    # Rank 0 reads the files for all: other hosts may not have them.
    config = parse_config(ranks.lead(lambda: load_config(preset, changes).to_dict()))
    folder = place(config)
    if folder is None:
        return config, build_trainer(config, command=command or "", ranks=ranks)
    return config, open_run(config, folder, ranks, held, command)


def gather_result(config: RunConfig, trainer: Trainer) -> TrainedRule:
    """What a trainer has come to, whether or not it is at its end."""
    best = trainer.best
    return TrainedRule(
        trainer.build_best(),
        trainer.describe(),
        config,
        trainer.step,
        best.value,
        best.step,
        trainer.finished,
        trainer.folder,
    )


def run_trainer(
    trainer: Trainer, console: Console | None, time_limit: float | None = None, on_step: OnStep | None = None
) -> None:
    """Train to the end, and tell on a console what runs, how far it is, and where the best rule lies.

    Args:
        trainer: new or resumed.
        console: None tells nothing.
        time_limit: seconds after which training ends with the best rule so far; None: only with its last step.
        on_step: called after every outer step.
    Raises:
        Interrupted: by a signal; the state is saved if there is a folder, and the message says how to go on.
        ValueError: memory does not suffice, or training has come to nothing.
    """
    with ExitStack() as shown:
        shown.enter_context(explain_memory(trainer.card.get("config", {})))
        listeners = [] if on_step is None else [on_step]
        if console is not None:
            from lopt.meta.runs.progress import TrainingProgress, tell_plan

            tell_plan(trainer, console)
            listeners.append(shown.enter_context(TrainingProgress(console, trainer)).update)

        def tell(progress: Progress) -> None:
            for listener in listeners:
                listener(progress)

        try:
            trainer.run(tell, time_limit)
        except Interrupted:
            raise Interrupted(_describe_stop(trainer)) from None
    if console is not None:
        from lopt.meta.runs.progress import tell_end

        tell_end(trainer, console)


def _describe_stop(trainer: Trainer) -> str:
    if trainer.folder is None:
        return f"stopped at step {trainer.step}; nothing was kept, as the run has no folder"
    return f"stopped at step {trainer.step} and saved; go on with: {resume_command(trainer.folder)}"


def _describe_call(preset: Preset) -> str:
    """What the card says began the run."""
    name = preset.name if isinstance(preset, RunConfig) else "{...}" if isinstance(preset, Mapping) else str(preset)
    return f"lopt.train({name!r}, ...)"
