"""The configuration of a meta-training run: TOML presets, overrides, and what they build.

A preset has the sections of `RunConfig`. `[task]`, `[rule]`, `[estimator]` and `[horizon]` name an entry of a
registry; their other keys are its constructor's arguments. `[[source]]` mixes several tasks and estimators.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from lopt.core.devices import check_device
from lopt.core.names import suggest
from lopt.core.schema import conform, list_options
from lopt.meta.config.samplers import draw_options, is_sampler
from lopt.meta.estimators import ESTIMATORS, Estimator
from lopt.meta.unroll.horizons import HORIZONS, HorizonSchedule
from lopt.rules import RULES, Rule
from lopt.tasks import TASKS, TRANSFORMS, RandomScaling, TaskFamily

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
MERGES = ("mean", "normalised", "pcgrad")

Options = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainerConfig:
    """The outer loop.

    Attributes:
        steps: outer steps.
        tasks: slots of each source, T.
        learning_rate: of AdamW on the meta-weights; linear warm-up over `warmup` steps, then cosine decay to
            `final_learning_rate` times this.
        weight_decay: AdamW's.
        beta2: AdamW's second decay.
        clip: largest global norm of the meta-gradient.
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
            with several families the mean over them of its log relative to the first loss.
        patience: validations without a better one after which the run ends; 0 goes on to the last step.
        checkpoint_every: outer steps between checkpoints.
        device: of rule, data and slots: "cpu", "cuda" (under torchrun each process its own GPU) or such as "cuda:1".
        capture: make the inner steps of evolution strategies' populations from one CUDA graph, on a GPU.
        threads: of torch on the CPU; results are reproducible for a given number.
        memory_mib: budget for backpropagation on each rank, from which `task_chunk` and `checkpoint` follow where an
            estimator is given neither; 0 sets no bound.
    """

    steps: int = 1000
    tasks: int = 8
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.01
    warmup: int = 20
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0
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
    threads: int = 2
    memory_mib: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("steps", "tasks", "validate_every", "validation_tasks", "validation_steps")
        for name in (*at_least_one, "checkpoint_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"trainer.{name} must be positive, got {getattr(self, name)}")
        for name in ("memory_mib", "final_learning_rate", "warmup", "weight_decay", "seed", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name} must not be negative, got {getattr(self, name)}")
        check_device(self.device)
        if self.merge not in MERGES:
            raise ValueError(f"trainer.merge must be one of {MERGES}, got {self.merge!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"trainer.average must be from 0 to below 1, got {self.average}")
        if self.validation_metric not in ("final", "mean", "log"):
            raise ValueError(f"trainer.validation_metric must be final, mean or log, got {self.validation_metric!r}")


@dataclass(frozen=True)
class ImitationConfig:
    """A teacher to imitate (Chen et al. 2020, arXiv 2010.09089).

    Attributes:
        teacher: name of a rule, or "" for none.
        options: the teacher's constructor arguments.
        weight: of the imitation loss in the meta-loss, 0 or more.
        follow: share of tasks that take the teacher's steps, 0 to 1.
        steps: outer steps over which weight and share fall to 0, linearly; 0 keeps them.
    """

    teacher: str = ""
    options: Options = field(default_factory=dict)
    weight: float = 1.0
    follow: float = 0.5
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"imitation.weight must be finite and not negative, got {self.weight}")
        if not 0 <= self.follow <= 1:
            raise ValueError(f"imitation.follow must be from 0 to 1, got {self.follow}")
        if self.steps < 0:
            raise ValueError(f"imitation.steps must not be negative, got {self.steps}")

    def weigh(self, step: int) -> float:
        """The factor on weight and share in outer step `step`, from 0."""
        return max(0.0, 1 - step / self.steps) if self.steps else 1.0


@dataclass(frozen=True)
class EvaluationConfig:
    """What the finished rule is compared on.

    Attributes:
        seeds: held-out tasks per setting.
        steps: lengths of the runs; the first is the one the rule is meant for.
        variants: further tasks, each a `title` and changes to the task's options.
    """

    seeds: int = 20
    steps: list[int] = field(default_factory=lambda: [100])
    variants: list[Options] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"evaluation.seeds must be at least 1, got {self.seeds}")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"evaluation.steps must be one or more numbers of at least 1, got {self.steps}")


@dataclass(frozen=True)
class SourceConfig:
    """A share of every outer step: tasks of a family, and an estimator of the meta-gradient on them.

    Attributes:
        task, estimator, horizon: as the sections of the same names, which are the defaults. An option of the task may
            be drawn: see `lopt.meta.config.samplers`.
        name: what logs and reports call it; the task's name by default.
        tasks: slots; `trainer.tasks` by default.
        weight: of its meta-gradient.
        random_scaling, transforms: those of the run by default.
        buckets: families that are drawn from the task's samplers, by the run's seed. Each is a source by itself, with
            its share of slots and weight.
    """

    task: Options = field(default_factory=dict)
    name: str = ""
    estimator: Options = field(default_factory=dict)
    horizon: Options = field(default_factory=dict)
    tasks: int | None = None
    weight: float = 1.0
    random_scaling: float | None = None
    transforms: list[Options] | None = None
    buckets: int = 1

    def __post_init__(self) -> None:
        for name in ("tasks", "buckets"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"source.{name} must be at least 1, got {value}")
        if not 0 < self.weight < inf:
            raise ValueError(f"source.weight must be positive and finite, got {self.weight}")
        _check_scaling(self.random_scaling or 0.0)

    def build_task(self) -> TaskFamily:
        """The family that the rule is judged on, without augmentation."""
        return build("task", TASKS, self.task)

    def transform(self, family: TaskFamily) -> TaskFamily:
        """The family that the rule is trained on."""
        if self.random_scaling:
            family = RandomScaling(family, self.random_scaling)
        for i, options in enumerate(self.transforms or []):
            family = build(f"transforms[{i}]", TRANSFORMS, options, family=family)
        return family

    def build_horizon(self) -> HorizonSchedule:
        """The schedule of horizons."""
        return build("horizon", HORIZONS, self.horizon)


@dataclass(frozen=True)
class RunConfig:
    """All of a run. `name` labels the rule, `description` says in a line what it is for.

    A `horizon` without a name is constant. Without a `source`, the sections `task`, `estimator` and `horizon` are one.
    `transforms` are changes to the tasks that are trained on, one after the other, each an entry of `TRANSFORMS`;
    `random_scaling = x` is short for one by element with the range x.
    """

    name: str
    rule: Options
    task: Options = field(default_factory=dict)
    estimator: Options = field(default_factory=dict)
    description: str = ""
    horizon: Options = field(default_factory=dict)
    random_scaling: float = 0.0
    transforms: list[Options] = field(default_factory=list)
    source: list[SourceConfig] = field(default_factory=list)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _check_scaling(self.random_scaling)
        object.__setattr__(self, "horizon", {"name": "constant"} | self.horizon)
        for section in ("task", "estimator"):
            if not getattr(self, section) and not (self.source and all(getattr(s, section) for s in self.source)):
                raise ValueError(f"{section} is missing")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts; `parse_config` undoes it."""
        return asdict(self)

    def list_sources(self) -> list[SourceConfig]:
        """The sources with all defaults filled in, and buckets drawn: there are no samplers and no buckets any more.

        Raises:
            ValueError: a sampler is not understood, fewer slots than buckets, buckets of which all would be equal.
        """
        found = [bucket for i, s in enumerate(self.source or [SourceConfig()]) for bucket in self._draw_buckets(i, s)]
        count, seen, named = Counter(source.name for source in found), Counter[str](), []
        for source in found:
            seen[source.name] += 1
            more = f" {seen[source.name]}" if count[source.name] > 1 else ""
            named.append(replace(source, name=source.name + more))
        return named

    def _draw_buckets(self, index: int, source: SourceConfig) -> list[SourceConfig]:
        task, tasks, buckets = source.task or self.task, source.tasks or self.trainer.tasks, source.buckets
        name = conform(task.get("name"), str, "task.name")
        where = f"source {source.name or name!r}"
        if buckets > tasks:
            raise ValueError(f"{where}: {buckets} buckets need as many tasks (slots) at least, got {tasks}")
        if buckets > 1 and not any(map(is_sampler, task.values())):
            raise ValueError(f"{where}: {buckets} buckets would be equal: no option of its task is drawn")
        kinds = list_options(TASKS[name]) if name in TASKS else {}
        drawn = draw_options(task, kinds, buckets, self.trainer.seed, f"source {index}", "task")
        slots = [tasks // buckets + (i < tasks % buckets) for i in range(buckets)]
        return [
            SourceConfig(
                task=options,
                name=source.name or name,
                estimator=source.estimator or self.estimator,
                horizon={"name": "constant"} | source.horizon if source.horizon else self.horizon,
                tasks=share,
                weight=source.weight * share / tasks,
                random_scaling=self.random_scaling if source.random_scaling is None else source.random_scaling,
                transforms=self.transforms if source.transforms is None else source.transforms,
            )
            for options, share in zip(drawn, slots, strict=True)
        ]

    def list_families(self) -> list[SourceConfig]:
        """The first source of each different task: what the rule is validated and judged on."""
        found: list[SourceConfig] = []
        for source in self.list_sources():
            if source.task not in [other.task for other in found]:
                found.append(source)
        return found

    def build_rule(self) -> Rule:
        """The untrained rule."""
        return build("rule", RULES, self.rule)

    def build_estimator(self, source: SourceConfig) -> Estimator:
        """A source's estimator, with the teacher of `[imitation]`."""
        given: dict[str, Any] = {}
        if self.imitation.teacher:
            teacher = build("imitation.teacher", RULES, {"name": self.imitation.teacher, **self.imitation.options})
            given = {"teacher": teacher, "imitation": self.imitation.weight, "follow": self.imitation.follow}
        return build("estimator", ESTIMATORS, source.estimator, **given)


def _check_scaling(value: float) -> None:
    if not 0 <= value < inf:
        raise ValueError(f"random_scaling must be finite and not negative, got {value}")


def build(section: str, registry: Mapping[str, type[T]], options: Mapping[str, Any], **given: Any) -> T:
    """The entry of `registry` that `options["name"]` names, constructed with the other options.

    Args:
        given: further arguments, which a preset could not hold.
    Raises:
        ValueError: unknown name or option (the known ones are listed), or a value of another type than the
            constructor's annotation says, or one that it refuses.
    """
    name = conform(options.get("name"), str, f"{section}.name")
    if name not in registry:
        raise ValueError(f"{section}.name: {name!r} is unknown. {suggest(name, registry)}")
    known = list_options(registry[name])
    checked = {}
    for option, value in options.items():
        if option == "name":
            continue
        if option not in known:
            raise ValueError(f"{section}.{option} is unknown to {name!r}. {suggest(option, known)}")
        checked[option] = conform(value, known[option], f"{section}.{option}")
    try:
        return registry[name](**checked, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}: {name}: {error}") from error


def list_presets() -> dict[str, str]:
    """Names of the shipped presets and what they are for."""
    found = {}
    for path in sorted(PRESETS.glob("*.toml")):
        found[path.stem] = str(tomllib.loads(path.read_text()).get("description", ""))
    return found


def load_config(preset: str, overrides: list[str] | None = None) -> RunConfig:
    """The configuration from a preset's name or a TOML file's path.

    Args:
        overrides: TOML lines such as `trainer.steps=100` or `rule.name="lstm"`; a bare word is taken as a string.
    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not TOML, or unknown or ill-typed entries.
    """
    path = PRESETS / f"{preset}.toml"
    if not path.is_file():
        path = Path(preset)
        if path.suffix != ".toml":
            raise ValueError(f"no preset is called {preset!r}. {suggest(preset, list_presets())}; or give a .toml file")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {preset}")
    try:
        raw = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    raw.setdefault("name", path.stem)
    for override in overrides or []:
        merge(raw, parse_override(override))
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from nested dicts.

    Raises:
        ValueError: an entry is missing, unknown, of the wrong type or out of range.
    """
    config: RunConfig = conform(raw, RunConfig, "")
    return config


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as nested dicts.

    Raises:
        ValueError: not of that form.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip() or "\n" in text:
        raise ValueError(f"an override looks like trainer.steps=100, got {text!r}")
    for written in (value, _quote(value.strip())):
        try:
            parsed: dict[str, Any] = tomllib.loads(f"{key} = {written}")
            return parsed
        except tomllib.TOMLDecodeError:
            continue
    raise ValueError(f"an override looks like trainer.steps=100, got {text!r}")


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def merge(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put nested `changes` into `target`."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value
