"""The outer loop: meta-gradients into AdamW, validation on held-out tasks, checkpoints, exact resume.

A run is a pure function of its configuration. All that it goes on from is in `lopt.meta.trainer.state.RunState`, which
its checkpoint holds; random draws are named (see `lopt.core.random`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lopt.core.devices import find_device
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import Estimator
from lopt.meta.loggers import Logger
from lopt.meta.loggers.tensorboard import TensorBoard
from lopt.meta.trainer.best import Best, holds_rule
from lopt.meta.trainer.checkpoint import RULE, read_snapshot, write_snapshot
from lopt.meta.trainer.log import RunLog
from lopt.meta.trainer.memory_plan import fit_all
from lopt.meta.trainer.merging import Merger, merge_ranks
from lopt.meta.trainer.meta_weights import copy_rule, copy_weights, freeze_weights, load_weights
from lopt.meta.trainer.outer_optimizer import OuterOptimizer
from lopt.meta.trainer.phases import Phases, measure_memory
from lopt.meta.trainer.ranks import FailedLead, Ranks
from lopt.meta.trainer.source import Source, choose_sources, describe_sources, list_families, list_sources
from lopt.meta.trainer.state import RunState
from lopt.meta.trainer.stop import MAX_DEAD_STEPS, Reason, Stop
from lopt.meta.trainer.validation import Validator, log_validation
from lopt.meta.unroll.horizons import HorizonSchedule
from lopt.meta.unroll.on_gpu import choose_stride
from lopt.rules import Rule
from lopt.rules.files import save
from lopt.tasks import TaskFamily


class Interrupted(Exception):
    """The run was asked to stop by a signal; it has saved its state, if it has a folder, and can be resumed.

    What it has learned so far is in the trainer that raised it.
    """


class Progress(NamedTuple):
    """What a caller hears after every outer step, and once before the first, to show or record it.

    Attributes:
        step, steps: made so far, and in all.
        metrics: of this step; empty before the first.
        validation: figures of held-out tasks, where this was a step to validate after.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]
    validation: Mapping[str, float] | None


class Trainer:
    """Meta-trains a rule.

    Args:
        rule: trained in place, on the device of the configuration.
        tasks: a family to train on, with `estimator`; or sources, which have estimators and horizons of their own.
        estimator: where the meta-gradient comes from; None for sources.
        config: settings of the outer loop.
        horizon: schedule of the training tasks' lengths.
        validation_family: tasks to choose the best weights on; the family that is trained on by default.
        folder: where checkpoints, metrics and the best rule go; nothing is written without one.
        card: training card to put into the rule file.
        ranks: the processes that share the slots; all of them make the same trainer.
        loggers: what rank 0 logs to beside the folder's `metrics.jsonl`, if there is a folder; TensorBoard by default.
    Raises:
        ValueError: there are more processes than slots, no estimator for a family, or one beside sources,
            `trainer.device` is not there, `trainer.train_only` fits no meta-weight, or `trainer.warm_start` is not a
            file of this rule.
    """

    def __init__(
        self,
        rule: Rule,
        tasks: TaskFamily | Sequence[Source],
        estimator: Estimator | None,
        config: TrainerConfig,
        *,
        horizon: HorizonSchedule | None = None,
        validation_family: TaskFamily | None = None,
        folder: Path | str | None = None,
        card: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        loggers: Sequence[Logger] | None = None,
    ) -> None:
        sources = list_sources(tasks, estimator, config, horizon, validation_family)
        self.rule, self.sources, self.config, self.ranks = rule, sources, config, ranks or Ranks()
        self.folder, self.card, self.phases = None if folder is None else Path(folder), dict(card or {}), Phases()
        self.loggers = [TensorBoard()] if loggers is None else list(loggers)
        # A rank without a slot would have nothing to do, and torchrun would wait for it all the same.
        self.slots = sum(source.tasks for source in self.sources)
        if self.ranks.size > self.slots:
            raise ValueError(
                f"{self.ranks.size} processes cannot share {self.slots} tasks (slots): start at most {self.slots} "
                "processes, or raise trainer.tasks"
            )
        self.device = find_device(config.device)
        # The weights are final before anything copies them: the average, the best so far, the outer optimizer.
        if config.warm_start:
            load_weights(rule, config.warm_start)
        freeze_weights(rule.to(self.device), config.train_only)
        self.outer, self.best = OuterOptimizer(rule, config), Best(rule)
        self.merger = Merger(config.merge, [source.weight for source in self.sources])
        self.state = RunState(rule, self.sources, self.outer, self.merger, self.best)
        # Slots are numbered through all sources: a number names a slot's draws in the whole run.
        first = 0
        for source in self.sources:
            source.start(rule, config.seed, first, self.ranks, self.device)
            stride = choose_stride(rule, source.family, self.device, capture=config.capture)
            source.loop = replace(source.loop, stride=stride)
            first += source.tasks
        self.validator = Validator(list_families(self.sources), config, self.ranks)
        # After the slots have started: what a task takes is measured on them.
        self.plans = fit_all(self.sources, config.memory_mib)
        self._stop = Stop()

    # -- the loop ----------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Outer steps made so far, those before a resume included."""
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether all steps are made, or validations have not improved for as long as `patience` allows.

        A finished run is not gone on with: `run` then returns its best rule at once.
        """
        return self.step >= self.config.steps or 0 < self.config.patience <= self.best.stale

    def run(self, on_step: Callable[[Progress], None] | None = None, time_limit: float | None = None) -> Rule:
        """Train to the end and return the rule with the best weights found.

        Args:
            on_step: called after every outer step.
            time_limit: seconds after which the run ends as if it were over; its checkpoint can be gone on from, as if
                it had not ended.
        Raises:
            Interrupted: a signal (SIGINT, SIGTERM) arrived on a rank; the state is saved if there is a folder.
            OSError: the folder cannot be written, as on a full disk; the last checkpoint is whole.
            FailedLead: this on rank 0.
            LostRank: another process is gone.
            ValueError: for `MAX_DEAD_STEPS` steps no task gave a finite meta-gradient; no held-out task is finite, or
                the rule diverges on all of them.

        A rule that was never better than before training comes back with a warning.
        """
        self._stop = Stop(time_limit)
        writes = self.folder if self.ranks.leads else None
        if writes:
            writes.mkdir(parents=True, exist_ok=True)
        # Results are reproducible for a number of threads; the caller's is given back, whatever happens.
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            start = self.step if self.state.begun else -1
            logged = RunLog(writes, start, self.loggers, self.card) if writes else nullcontext()
            with logged as log:
                with self._stop.on_signals():
                    self._loop(log, on_step)
                if log:
                    log.result({"best": self.best.value, "best_step": float(self.best.step)})
        finally:
            torch.set_num_threads(threads)
        self.best.check(self.validator.tasks, self.ranks.leads)
        return self.build_best()

    def _loop(self, log: RunLog | None, on_step: Callable[[Progress], None] | None) -> None:
        # What the rule can do before training is the first point of every curve.
        if not self.state.begun:
            self._after_step(log, on_step, {}, {})
        while not self._is_over():
            metrics, parts = self._step_sources()
            self._after_step(log, on_step, metrics, parts)
            # All ranks stop after the same step, or some would wait for others in the next one.
            reason = Reason(self.ranks.find_largest(self._stop.reason))
            if reason == Reason.NONE or self.finished:
                continue
            if self.folder:
                self.save()
            if reason == Reason.SIGNAL:
                raise Interrupted
            if self.best.validated < self.step:  # not in the checkpoint: the run goes on as if it had not ended
                self.validate(log)
                if self.folder:
                    self.ranks.lead(self.save_rule)
            return
        self.mend_rule()

    def _is_over(self) -> bool:
        """Whether the run is finished; an error where it has learned nothing for long.

        Both follow from what a checkpoint holds, so that a resumed run ends where an uninterrupted one does.
        """
        if self.state.dead.in_a_row >= MAX_DEAD_STEPS:
            # Every rank sees the same metrics and gives up by itself; rank 0 is the one that explains.
            raise (ValueError if self.ranks.leads else FailedLead)(self.state.dead.explain(self.step, self.best.step))
        return self.finished

    def build_best(self) -> Rule:
        """A rule with the best weights that validation has found so far; a copy, which training does not touch.

        Before the first validation these are the weights that training started from.
        """
        return self.best.build(self.rule)

    def _after_step(
        self,
        log: RunLog | None,
        on_step: Callable[[Progress], None] | None,
        metrics: Mapping[str, float],
        parts: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Validate, log, save and tell, where it is time to."""
        config = self.config
        # The order matters for a resume: a checkpoint must know the validation of its own step.
        if log and metrics:
            with self.phases("log"):
                log.scalars("train", self.step, metrics)
                for name, values in parts.items():
                    log.scalars(f"source {name}", self.step, values)
        validation = None
        if self.step % config.validate_every == 0 or self.finished:
            validation = self.validate(log)
        if self.folder and (self.step % config.checkpoint_every == 0 or self.finished):
            with self.phases("save"):
                self.save()
        if log and validation:
            log.scalars("cost", self.step, self.phases.take() | measure_memory(self.device))
        if on_step:
            on_step(Progress(self.step, config.steps, metrics, validation))

    def train_step(self) -> dict[str, float]:
        """One outer step, for those who drive the loop themselves: no validation, no log, no checkpoint.

        Returns:
            What `run` would log: means over tasks and sources, norms, `learning_rate`, speed.
        """
        return self._step_sources()[0]

    def _step_sources(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """One outer step; what to log of the whole, and of each source where there are several."""
        # Estimates on this rank's slots, one gradient of all ranks and sources, and the step.
        begin = time.perf_counter()
        chosen = choose_sources(len(self.sources), self.config.sources_per_step, self.config.seed, self.step)
        with self.phases("estimate"):
            estimates = [source.estimate(self.step) if i in chosen else None for i, source in enumerate(self.sources)]
        with self.phases("merge"):
            totals = merge_ranks(estimates, self.rule.meta_weights(), self.ranks)
            total = self.merger(totals)
        with self.phases("apply"):
            stepped = self.outer.apply(total.gradient, self.step)
        seconds = time.perf_counter() - begin
        self.state.step += 1
        self.state.seconds += seconds
        self.state.dead.count(total.metrics | stepped, sum(self.sources[i].tasks for i in chosen))
        speed, stage = total.metrics["inner_steps"] / seconds, max(source.stage for source in self.sources)
        whole = total.metrics | stepped | {"inner_steps_per_second": speed, "horizon_stage": stage}
        return whole, describe_sources(self.sources, totals)

    # -- validation --------------------------------------------------------------------------------

    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """Run held-out tasks with the present weights, or their average; keep them if they are the best so far.

        Returns:
            The figures of `Validation`, and the best one so far.
        """
        # With averaging it is the average that is judged and kept; training goes on from the weights themselves.
        weights = copy_weights(self.rule) | (self.outer.average if self.config.average else {})
        rule = copy_rule(self.rule, weights) if self.config.average else self.rule
        with self.phases("validate"):
            found = self.validator.judge(rule)
        improved = self.best.hear(found.figures, self.config.validation_metric, self.step, weights)
        # The untrained rule's figure is the best so far by being the first: no success to a curriculum.
        for source in self.sources:
            if source.horizon and self.step > 0:
                source.horizon.validated(improved)
        if log:
            with self.phases("log"):
                log_validation(log, self.step, found, self.best.value)
                log.weights(self.step, self.rule.meta_weights(), self.outer.updates)
        return found.figures | {"best": self.best.value}

    # -- saving ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, and the best rule so far beside it; rank 0 writes what all have.

        Raises:
            OSError: one of them cannot be written; the file that was there before is unchanged.
            FailedLead: this on rank 0.
        """
        # All ranks gather, as each has its own carries, and rank 0 alone writes.
        tensors, metadata = self.state.gather()

        def write() -> None:
            assert self.folder is not None
            write_snapshot(self.folder, tensors, metadata | {"config": self.card.get("config")})
            self.save_rule()

        self.ranks.lead(write)

    @property
    def rule_path(self) -> Path:
        """Where the best rule so far is kept: a rule file that `lopt.load` takes, beside the checkpoint.

        Only for a trainer with a folder.
        """
        assert self.folder is not None
        return self.folder / RULE

    def save_rule(self) -> None:
        """Write the rule file with the best weights, and a card that says how they were trained and how good they are.

        Raises:
            OSError: it cannot be written; the file that was there before is unchanged.
        """
        save(self.build_best(), self.rule_path, self.describe())

    def describe(self) -> dict[str, Any]:
        """The card of the best rule so far: what the run is, how far it got, and how good validation found it."""
        best = self.best.describe(self.config.validation_metric)
        training = {"trained_steps": self.step, **best, "seconds": round(self.state.seconds, 1)}
        return self.card | {"training": training}

    def mend_rule(self) -> None:
        """Write the rule file, where there is a folder, unless it is that of the present state already.

        A kill between the writes of a checkpoint and of its rule file leaves an older rule, and people may lose one.
        """

        def mend() -> None:
            if self.folder and not holds_rule(self.rule_path, self.build_best(), self.describe()["training"]):
                self.save_rule()

        self.ranks.lead(mend)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same configuration but for the device, of any number of processes.

        Rank 0 reads it for all.

        Raises:
            ValueError: not a checkpoint of this configuration, or a damaged one.
            FailedLead: this on rank 0.
        """
        names = self.state.list_tensors()
        # All is known to fit before anything is changed.
        self.state.restore(*read_snapshot(path, self.card.get("config"), names, self.ranks))
