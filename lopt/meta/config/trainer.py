"""The settings of an outer loop: how long, how fast, what is validated, and on what it runs.

They are apart from the rest of the configuration because `Trainer` needs no more than these: whoever builds rule, tasks
and estimators in Python never meets a preset.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lopt.core.devices import check_device
from lopt.core.names import choose

MERGES = ("mean", "normalised", "pcgrad")
METRICS = ("final", "mean", "log", "error")


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of the outer loop: the table `[trainer]` of a preset, or the `config` of a `Trainer` in Python.

    Every value is checked when it is made, so that a run of hours does not end at a typing error.

    Attributes:
        steps: outer steps.
        tasks: slots of each source, T.
        learning_rate: of AdamW on the meta-weights; linear warm-up over `warmup` steps, then cosine decay to
            `final_learning_rate` times this.
        learning_rates: peaks of their own, in place of `learning_rate`, for meta-weights whose names fit a pattern (as
            of files); of several that fit the first one.
        weight_decay: AdamW's.
        beta2: AdamW's second decay.
        clip: largest global norm of the meta-gradient.
        sources_per_step: how many of the sources an outer step learns from, drawn anew for each; 0 takes all.
        merge: of several sources' meta-gradients: their weighted "mean"; that of the "normalised" ones, each divided
            by a running root mean square of its norm, so that no source outweighs the others; or ("pcgrad") that of
            what is left of each without its parts against another one.
        seed: names every random draw of the run.
        warm_start: shipped name or rule file whose meta-weights are started from; of the same rule.
        train_only: patterns of names (as of files, with * and ?) of the meta-weights that are learned; all by default.
        average: of the meta-weights, by this share of the average and the rest of the present ones; it is validated
            and saved instead of them. 0.999 averages about 1000 steps, 0 does not average.
        validate_every: outer steps between validations.
        validation_tasks, validation_steps: held-out tasks of each family, and their length.
        validation_metric: what "best" means: "final" (mean loss over the last tenth of the steps), "mean" or "log";
            with several families the mean over them of its log relative to the first loss. Of classifiers also
            "error": the share of held-out examples that they have wrong at the end.
        patience: validations without a better one after which the run ends; 0 goes on to the last step.
        checkpoint_every: outer steps between checkpoints.
        device: of rule, data and slots: "cpu", "cuda" (under torchrun each process its own GPU) or such as "cuda:1".
        capture: make the inner steps of evolution strategies' populations from one CUDA graph, on a GPU.
        threads: of torch on the CPU; results are reproducible for a given number. Small tasks gain nothing from a
            second one, and lose much where other processes want the cores.
        memory_mib: budget for backpropagation on each rank, from which `task_chunk` and `checkpoint` follow where an
            estimator is given neither; 0 sets no bound.

    Raises:
        ValueError: a value out of its range, by the name `trainer.NAME`.
    """

    steps: int = 1000
    tasks: int = 8
    learning_rate: float = 3e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    final_learning_rate: float = 0.01
    warmup: int = 20
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0
    sources_per_step: int = 0
    merge: str = "mean"
    seed: int = 0
    warm_start: str = ""
    train_only: list[str] = field(default_factory=list)
    average: float = 0.0
    validate_every: int = 50
    validation_tasks: int = 16
    validation_steps: int = 100
    validation_metric: str = "final"
    patience: int = 0
    checkpoint_every: int = 50
    device: str = "cpu"
    capture: bool = False
    threads: int = 1
    memory_mib: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("steps", "tasks", "validate_every", "validation_tasks", "validation_steps")
        for name in (*at_least_one, "checkpoint_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")
        # Asked for this way round, so that NaN, which TOML can write, is refused as well.
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"trainer.{name} must be positive, got {getattr(self, name)}")
        for pattern, rate in self.learning_rates.items():
            if not rate > 0:
                raise ValueError(f"trainer.learning_rates: {pattern!r} must be positive, got {rate}")
        for name in (
            "memory_mib",
            "final_learning_rate",
            "warmup",
            "weight_decay",
            "seed",
            "patience",
            "sources_per_step",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name} must not be negative, got {getattr(self, name)}")
        check_device(self.device)
        if self.capture and self.device == "cpu":
            raise ValueError("trainer.capture is of CUDA graphs and has no effect on the CPU: leave it out there")
        choose("trainer.merge", self.merge, MERGES)
        choose("trainer.validation_metric", self.validation_metric, METRICS)
        if not 0 <= self.average < 1:
            raise ValueError(f"trainer.average must be from 0 to below 1, got {self.average}")
