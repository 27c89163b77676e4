"""What a run learns from: one table `[[source]]` each, completed from the run's own sections, and families drawn of it.

A source goes through three forms. `SourceConfig` is what the file says, where anything may be left out and an option of
the task may be a sampler. `resolve` fills in the defaults: a `ResolvedSource` with its samplers. `draw` puts values in
their places: one `ResolvedSource` for each family drawn, with its share of slots and weight. Only the last are built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from lopt.core.schema import conform, list_options
from lopt.meta.config.build import build
from lopt.meta.config.samplers import draw_options, is_sampler
from lopt.meta.unroll.horizons import HORIZONS, HorizonSchedule
from lopt.tasks import TASKS, TRANSFORMS, RandomScaling, TaskFamily

Options = dict[str, Any]


@dataclass(frozen=True)
class SourceConfig:
    """A table `[[source]]`: a share of every outer step, with tasks of a family and an estimator on them.

    Attributes:
        task, estimator, horizon: as the sections of the same names, which are the defaults. An option of the task may
            be drawn: see `lopt.meta.config.samplers`. An estimator without a name is the run's, with these options.
        name: what logs and reports call it; the task's name by default.
        tasks: slots; `trainer.tasks` by default.
        weight: of its meta-gradient.
        random_scaling, transforms: those of the run by default.
        buckets: families that are drawn from the task's samplers, by the run's seed. Each is a source by itself, with
            its share of slots and weight.

    Raises:
        ValueError: a number out of its range.
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
        check_scaling(self.random_scaling or 0.0)


@dataclass(frozen=True)
class ResolvedSource:
    """A source with nothing left out: what a trainer's `Source` is built from, and what the rule is judged on.

    Attributes:
        name, task, estimator, horizon, tasks, weight, random_scaling, transforms: as in `SourceConfig`; none is empty
            for want of a value.
        draws: families to be drawn from the task's samplers; 1 once they are.
    """

    name: str
    task: Options
    estimator: Options
    horizon: Options
    tasks: int
    weight: float
    random_scaling: float
    transforms: list[Options]
    draws: int = 1

    def build_task(self) -> TaskFamily:
        """The family that the rule is judged on: the task as it is, without the transforms that augment training.

        Raises:
            ValueError: no such task, or an option that it does not have or refuses.
        """
        return build("task", TASKS, self.task)

    def transform(self, family: TaskFamily) -> TaskFamily:
        """The family that the rule is trained on: `family` under random scaling, then under the transforms in order.

        Raises:
            ValueError: a transform is unknown or refuses its options; the message names it as `transforms[i]`.
        """
        if self.random_scaling:
            family = RandomScaling(family, self.random_scaling)
        for i, options in enumerate(self.transforms):
            family = build(f"transforms[{i}]", TRANSFORMS, options, family=family)
        return family

    def build_horizon(self) -> HorizonSchedule:
        """The schedule that draws the lengths of the training tasks.

        Sources do not share one: each hears of validations by itself and moves through its own stages.
        """
        return build("horizon", HORIZONS, self.horizon)


def resolve(source: SourceConfig, defaults: SourceConfig) -> ResolvedSource:
    """Complete one source; its samplers stay as they are.

    Args:
        source: what the file says.
        defaults: the run's own sections, all of them given, in the form of a source.
    Raises:
        ValueError: the task has no name.
    """
    task = source.task or defaults.task
    name = conform(task.get("name"), str, "task.name")
    tasks = source.tasks or defaults.tasks
    # 0 and [] are answers, with which a source goes without what the run has; None leaves it to the run.
    scaling = defaults.random_scaling if source.random_scaling is None else source.random_scaling
    transforms = defaults.transforms if source.transforms is None else source.transforms
    assert tasks is not None
    return ResolvedSource(
        name=source.name or name,
        task=task,
        # Without a name it is the run's, with these options changed.
        estimator=source.estimator if "name" in source.estimator else defaults.estimator | source.estimator,
        horizon={"name": "constant"} | source.horizon if source.horizon else defaults.horizon,
        tasks=tasks,
        weight=source.weight,
        random_scaling=scaling or 0.0,
        transforms=transforms or [],
        draws=source.buckets,
    )


def draw(source: ResolvedSource, seed: int, index: int) -> list[ResolvedSource]:
    """The families of one source, with values in the place of samplers; a source without any comes back alone.

    Args:
        source: with `draws` families to be drawn.
        seed, index: the run's seed and the source's place among others name the draws.
    Returns:
        `source.draws` sources that share its slots as evenly as whole numbers allow, and its weight by their slots.
    Raises:
        ValueError: a sampler is not understood, there are fewer slots than draws, or all draws would be equal.
    """
    where, draws = f"source {source.name!r}", source.draws
    if draws > source.tasks:
        raise ValueError(f"{where}: {draws} buckets need as many tasks (slots) at least, got {source.tasks}")
    if draws > 1 and not any(map(is_sampler, source.task.values())):
        raise ValueError(f"{where}: {draws} buckets would be equal: no option of its task is drawn")
    family = source.task["name"]
    # An unknown task is refused when it is built, with the known ones listed.
    kinds = list_options(TASKS[family]) if family in TASKS else {}
    drawn = draw_options(source.task, kinds, draws, seed, f"source {index}", "task")
    # Weights go by slots, so that a slot counts the same in every family that is drawn.
    slots = [source.tasks // draws + (i < source.tasks % draws) for i in range(draws)]
    return [
        replace(source, task=options, tasks=share, weight=source.weight * share / source.tasks, draws=1)
        for options, share in zip(drawn, slots, strict=True)
    ]


def number_names(sources: Sequence[ResolvedSource]) -> list[ResolvedSource]:
    """The sources with a number after each name that several have, from 1, since logs and reports go by names.

    A name that only one source has stays as it is.
    """
    count, seen, numbered = Counter(source.name for source in sources), Counter[str](), []
    for source in sources:
        seen[source.name] += 1
        number = f" {seen[source.name]}" if count[source.name] > 1 else ""
        numbered.append(replace(source, name=source.name + number))
    return numbered


def check_scaling(value: float) -> None:
    """Refuse a range of `random_scaling` that no augmentation can have.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= value < inf:
        raise ValueError(f"random_scaling must be finite and not negative, got {value}")
