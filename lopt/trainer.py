"""The outer loop: meta-gradients into AdamW, validation on held-out tasks, checkpoints, exact resume.

A run is a pure function of its configuration. Its checkpoint holds meta-weights, outer optimizer, the estimator's
carry, horizon stage and the best weights so far; there is no other state, because random draws are named (see
`lopt.tensors`).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopt.checkpoint import load_state, save, save_state
from lopt.config import TrainerConfig
from lopt.estimators import Estimator
from lopt.evaluate import run_curves
from lopt.horizons import HorizonSchedule
from lopt.log import RunLog, flatten_dict
from lopt.rules import Rule
from lopt.tasks import TaskFamily
from lopt.unroll import InnerLoop

CHECKPOINT = "checkpoint.safetensors"
RULE = "rule.safetensors"
MAX_DEAD_STEPS = 20


class Interrupted(Exception):
    """The run was asked to stop; it has saved its state and can be resumed."""


class Progress(NamedTuple):
    """What a caller hears after every outer step."""

    step: int
    steps: int
    metrics: Mapping[str, float]
    validation: Mapping[str, float] | None


class Trainer:
    """Meta-trains a rule.

    Args:
        rule: trained in place.
        family: tasks to train on.
        estimator: where the meta-gradient comes from.
        config: settings of the outer loop.
        horizon: schedule of the training tasks' lengths.
        validation_family: tasks to choose the best weights on; `family` by default.
        folder: where checkpoints, metrics and the best rule go; nothing is written without one.
        card: training card to put into the rule file.
    """

    def __init__(
        self,
        rule: Rule,
        family: TaskFamily,
        estimator: Estimator,
        config: TrainerConfig,
        *,
        horizon: HorizonSchedule | None = None,
        validation_family: TaskFamily | None = None,
        folder: Path | str | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.rule, self.family, self.estimator, self.config = rule, family, estimator, config
        self.horizon = horizon
        self.validation_family = validation_family or family
        self.folder, self.card = None if folder is None else Path(folder), dict(card or {})
        self.step = 0
        self.best = math.inf
        self.best_step = 0
        self.best_weights = _copy_weights(rule)
        self.outer = torch.optim.AdamW(
            rule.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.loop = InnerLoop(rule, family, config.seed, horizon)
        self.carry = estimator.start(self.loop, torch.arange(config.tasks))
        self.seconds = 0.0
        self._stop, self._dead_steps = False, 0

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Progress], None] | None = None) -> Rule:
        """Train to the end and return the rule with the best weights found.

        Raises:
            Interrupted: a signal (SIGINT, SIGTERM) arrived; the state is saved if there is a folder.
            ValueError: for `MAX_DEAD_STEPS` steps no task gave a finite meta-gradient.
        """
        self._stop, self._dead_steps = False, 0
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        log = RunLog(self.folder, self.step) if self.folder else None
        try:
            with _stop_on_signal(self._request_stop):
                if self.step == 0:
                    self._after_step(log, on_step, {})
                while self.step < self.config.steps:
                    metrics = self.train_step()
                    self._after_step(log, on_step, metrics)
                    self._check_progress(metrics)
                    if self._stop and self.step < self.config.steps:
                        if self.folder:
                            self.save()
                        raise Interrupted
            if log:
                log.hparams(self.card.get("config", {}), {"best": self.best, "best_step": float(self.best_step)})
        finally:
            if log:
                log.close()
            torch.set_num_threads(threads)
        return self.build_best()

    def build_best(self) -> Rule:
        """A rule with the best weights so far."""
        best = deepcopy(self.rule)
        best.load_state_dict(self.best_weights)
        return best

    def _check_progress(self, metrics: Mapping[str, float]) -> None:
        """Give up where nothing is learned any more."""
        alive = math.isfinite(metrics["gradient_norm"]) and metrics["skipped_slots"] < self.config.tasks
        self._dead_steps = 0 if alive else self._dead_steps + 1
        if self._dead_steps >= MAX_DEAD_STEPS:
            raise ValueError(
                f"in the last {MAX_DEAD_STEPS} outer steps no task gave a finite meta-gradient (step {self.step}). "
                "Lower trainer.learning_rate, the rule's output scale or the loss's scale; the best weights so far "
                f"are those of step {self.best_step}"
            )

    def _request_stop(self) -> None:
        self._stop = True

    def _after_step(
        self,
        log: RunLog | None,
        on_step: Callable[[Progress], None] | None,
        metrics: Mapping[str, float],
    ) -> None:
        """Validate, log, save and tell, where it is time to."""
        config, last = self.config, self.step >= self.config.steps
        if log and metrics:
            log.scalars("train", self.step, metrics)
        validation = None
        if self.step % config.validate_every == 0 or last:
            validation = self.validate(log)
        if self.folder and (self.step % config.checkpoint_every == 0 or last):
            self.save()
        if on_step:
            on_step(Progress(self.step, config.steps, metrics, validation))

    def learning_rate(self) -> float:
        """Linear warm-up, then cosine decay to `final_learning_rate` of the peak."""
        config = self.config
        warm = min(1.0, (self.step + 1) / max(config.warmup, 1))
        low = config.final_learning_rate
        decay = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        return config.learning_rate * warm * decay

    def train_step(self) -> dict[str, float]:
        """One outer step; returns what to log."""
        begin = time.perf_counter()
        estimate = self.estimator.estimate(self.loop, self.carry)
        self.carry = estimate.carry
        for name, weight in self.rule.meta_weights().items():
            weight.grad = estimate.gradient[name]
        norm = torch.nn.utils.clip_grad_norm_(self.rule.parameters(), self.config.clip)
        rate = self.learning_rate()
        for group in self.outer.param_groups:
            group["lr"] = rate
        if bool(norm.isfinite()) and float(norm) > 0:  # all slots may have been dropped
            self.outer.step()
        self.outer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        return estimate.metrics | {
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "inner_steps_per_second": estimate.metrics["inner_steps"] / seconds,
            "horizon_stage": float(self.horizon.stage if self.horizon else 0),
        }

    # -- validation --------------------------------------------------------------------------------

    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """Run held-out tasks with the present weights; keep them if they are the best so far."""
        config = self.config
        curves = run_curves(
            self.rule,
            self.validation_family,
            torch.arange(config.validation_tasks),
            config.validation_steps,
            seed=config.seed,
            stream="validation",
            split="outer_valid",
        )
        losses = curves.losses[1:]
        tail = losses[-max(1, len(losses) // 10) :]
        values = {"final": tail.mean(), "mean": losses.mean(), "log": losses.clamp(min=1e-30).log().mean()}
        result = {key: float(value) for key, value in values.items()}
        metric = result[config.validation_metric]
        improved = metric < self.best  # false for NaN
        if improved:
            self.best, self.best_step = metric, self.step
            self.best_weights = _copy_weights(self.rule)
        if self.horizon and self.step > 0:
            self.horizon.validated(improved)
        result |= {"best": self.best} | {key: float(value.mean()) for key, value in curves.metrics.items()}
        if log:
            log.scalars("validation", self.step, result)
            log.figure("validation/curves", self.step, _plot_losses(losses))
        return result

    # -- saving ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, and the best rule so far beside it."""
        assert self.folder is not None
        metadata = {
            "step": self.step,
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "horizon_improved": self.horizon.improved if self.horizon else 0,
            "seconds": self.seconds,
            "config": self.card.get("config"),
        }
        save_state(self.folder / CHECKPOINT, self._tensors(), metadata)
        self.save_rule()

    @property
    def rule_path(self) -> Path:
        """Where the best rule so far is kept."""
        assert self.folder is not None
        return self.folder / RULE

    def save_rule(self) -> None:
        """Write the rule file with the best weights and the card."""
        trained = {
            "trained_steps": self.step,
            "best_step": self.best_step,
            "validation": {self.config.validation_metric: self.best if math.isfinite(self.best) else None},
            "seconds": round(self.seconds, 1),
        }
        save(self.build_best(), self.rule_path, self.card | {"training": trained})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights.{k}": v for k, v in _copy_weights(self.rule).items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        for index, state in self.outer.state_dict()["state"].items():
            tensors |= {f"outer.{index}.{key}": value for key, value in state.items()}
        leaves, _ = tree_flatten(self.carry)
        return tensors | {f"carry.{i}": leaf for i, leaf in enumerate(leaves)}

    def _check_config(self, path: Path, found: Any) -> None:
        expected = self.card.get("config")
        if isinstance(expected, dict) and isinstance(found, dict):
            old, new = flatten_dict(found), flatten_dict(json.loads(json.dumps(expected)))
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            if changed:
                changes = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
                raise ValueError(f"{path} was made with another configuration: {changes}. Undo it or start a new run")

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same configuration.

        Raises:
            ValueError: not a checkpoint of this configuration.
        """
        tensors, metadata = load_state(path)
        self._check_config(path, metadata.get("config"))
        expected, found = set(self._tensors()), set(tensors)
        outer = {key for key in found if key.startswith("outer.")}
        if expected - outer != found - outer:
            raise ValueError(
                f"{path} does not belong to this configuration: it lacks "
                f"{sorted(expected - found)[:3]} and has {sorted(found - expected)[:3]} besides"
            )
        self.rule.load_state_dict(_section(tensors, "weights."))
        self.best_weights = _section(tensors, "best.")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _section(tensors, "outer.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.outer.load_state_dict(self.outer.state_dict() | {"state": state})
        leaves, spec = tree_flatten(self.carry)
        restored = [tensors[f"carry.{i}"] for i in range(len(leaves))]
        self.carry = tree_unflatten(restored, spec)
        self.step, self.best_step = metadata["step"], metadata["best_step"]
        self.best = math.inf if metadata["best"] is None else metadata["best"]
        self.seconds = metadata["seconds"]
        if self.horizon:
            self.horizon.improved = metadata["horizon_improved"]


@contextmanager
def _stop_on_signal(request_stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks to stop, the second one is as usual; only in the main thread."""
    previous: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        request_stop()
        for caught, handler in previous.items():
            signal.signal(caught, handler)

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.getsignal(wanted)
            signal.signal(wanted, handle)
    except ValueError:  # not the main thread: signals are the caller's affair
        previous.clear()
    try:
        yield
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def _copy_weights(rule: Rule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in rule.state_dict().items()}


def _section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _plot_losses(losses: Tensor) -> Any:
    """Held-out loss curves for TensorBoard: every task thin, the median thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses.numpy(), color="tab:blue", alpha=0.2, linewidth=0.7)
    axes.plot(losses.median(1).values.numpy(), color="tab:blue", linewidth=2)
    axes.set(yscale="log", xlabel="step", ylabel="training-batch loss")
    return figure
