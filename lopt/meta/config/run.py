"""The configuration of a meta-training run: what a preset may say, checked as it is read.

A preset has the sections of `RunConfig`. `[task]`, `[rule]`, `[estimator]` and `[horizon]` name an entry of a
registry; their other keys are its constructor's arguments. `[[source]]` mixes several tasks and estimators.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.meta.config.build import build
from lopt.meta.config.sources import Options, ResolvedSource, SourceConfig, check_scaling, draw, number_names, resolve
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS, Estimator
from lopt.meta.loggers import LOGGERS, Logger
from lopt.rules import RULES, LearnedInit, Rule
from lopt.rules.learned_init import RANK, RATES


@dataclass(frozen=True)
class ImitationConfig:
    """The table `[imitation]`: a teacher that all sources imitate at first (Chen et al. 2020, arXiv 2010.09089).

    An imitated teacher leads a rule past the start, where its own meta-gradient is mostly noise.

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
        """How much of the teacher's influence is left in outer step `step` (from 0): a factor on weight and share.

        Returns:
            1 at first, falling linearly to 0 at `steps`; always 1 where `steps` is 0.
        """
        return max(0.0, 1 - step / self.steps) if self.steps else 1.0


@dataclass(frozen=True)
class InitConfig:
    """The table `[init]`, empty or not: the parameters that tasks start from are learned, too (`LearnedInit`).

    Attributes:
        rates: learned factors on the rule's step: "none", one for each "tensor", for each "element", a "matrix" for
            each side of a tensor, or "low_rank": one for each element beside `rank` directions through all parameters.
        rate: which they start from.
        rank: number of these directions.
        adapt: patterns of names of the parameters that a task changes; all by default.
    """

    rates: str = "none"
    rate: float = 1.0
    rank: int = RANK
    adapt: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choose("init.rates", self.rates, RATES)
        if self.rates == "none" and self.rate != 1:
            raise ValueError('init.rate has no effect: there are no learned rates. Set init.rates to "element"')
        if self.rates != "low_rank" and self.rank != RANK:
            raise ValueError(f'init.rank has no effect on rates {self.rates!r}: set init.rates to "low_rank"')


@dataclass(frozen=True)
class EvaluationConfig:
    """The table `[evaluation]`: what the finished rule is compared with tuned baselines on.

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
class RunConfig:
    """All of a run: everything that its result depends on, and what a run folder and a rule's card keep of it.

    Attributes:
        name: labels the rule in reports.
        rule, task, estimator: tables whose `name` is an entry of `RULES`, `TASKS` and `ESTIMATORS`.
        description: in a line, what it is for.
        init: where it is given, the initial parameters are learned, and the rule is what adapts them.
        horizon: a table for `HORIZONS`; without a name it is constant.
        random_scaling: x is short for a transform `random_scaling` by element with the range x.
        transforms: changes to the tasks that are trained on, one after the other, each an entry of `TRANSFORMS`.
        source: several tasks and estimators; without one the sections `task`, `estimator` and `horizon` are one.
        imitation, trainer, evaluation: settings of the parts that every run has.
        loggers: where the run is logged to beside its own folder's `metrics.jsonl`, each an entry of `LOGGERS`.

    Raises:
        ValueError: no task or no estimator for a source, or a number out of its range.
    """

    name: str
    rule: Options
    task: Options = field(default_factory=dict)
    estimator: Options = field(default_factory=dict)
    description: str = ""
    init: InitConfig | None = None
    horizon: Options = field(default_factory=dict)
    random_scaling: float = 0.0
    transforms: list[Options] = field(default_factory=list)
    source: list[SourceConfig] = field(default_factory=list)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loggers: list[Options] = field(default_factory=lambda: [{"name": "tensorboard"}])

    def __post_init__(self) -> None:
        check_scaling(self.random_scaling)
        # Written out in full, since a card must say which schedule it was.
        object.__setattr__(self, "horizon", {"name": "constant"} | self.horizon)
        for section in ("task", "estimator"):
            named = ["name" in getattr(source, section) for source in self.source]
            if not getattr(self, section) and not (named and all(named)):
                raise ValueError(f"{section} is missing")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, which JSON and TOML can hold; `parse_config` makes the same configuration of them.

        All defaults are written out, so that a run is repeated as it was even where a later version has others.
        """
        return asdict(self)

    def list_sources(self) -> list[ResolvedSource]:
        """All that the run learns from: sources with their defaults filled in, and one for each family drawn.

        Returns:
            At least one, under names that are all different; no option is a sampler any more.
        Raises:
            ValueError: a sampler is not understood, fewer slots than buckets, buckets of which all would be equal.
        """
        defaults = SourceConfig(
            task=self.task,
            estimator=self.estimator,
            horizon=self.horizon,
            tasks=self.trainer.tasks,
            random_scaling=self.random_scaling,
            transforms=self.transforms,
        )
        # A run without sources is one that leaves everything to the run's own sections.
        resolved = [resolve(source, defaults) for source in self.source or [SourceConfig()]]
        seed = self.trainer.seed
        return number_names([drawn for i, source in enumerate(resolved) for drawn in draw(source, seed, i)])

    def list_families(self) -> list[ResolvedSource]:
        """What the rule is validated and judged on: of the sources with equal tasks the first one.

        Two sources may share a task and differ in estimator or horizon; judging it twice would tell nothing.
        """
        different: list[ResolvedSource] = []
        for source in self.list_sources():
            if source.task not in [other.task for other in different]:
                different.append(source)
        return different

    def build_rule(self) -> Rule:
        """The rule of section `[rule]` before any training, its meta-weights as its constructor draws them.

        With `[init]` that is a `LearnedInit` around it, which starts from what the first family draws.

        Raises:
            ValueError: no such rule, or an option that it does not have or refuses.
        """
        rule = build("rule", RULES, self.rule)
        if self.init is None:
            return rule
        family, generator = (
            self.list_families()[0].build_task(),
            make_generator(derive_seeds(self.trainer.seed, "start")),
        )
        params = family.init(family.sample(generator), generator)
        shapes = {name: list(p.shape) for name, p in params.items()}
        longest = max(map(self.find_longest, self.list_sources()))
        init = self.init
        learned = LearnedInit(shapes, rule.name, rule.config, init.adapt, init.rates, init.rate, longest, init.rank)
        learned.set_initial(params)
        return learned

    def find_longest(self, source: ResolvedSource) -> int:
        """Steps of the longest run that a source trains on."""
        estimator = self.build_estimator(source)
        return source.build_horizon().longest if estimator.draws_horizons else estimator.num_steps

    def build_estimator(self, source: ResolvedSource) -> Estimator:
        """A source's estimator, with the teacher of `[imitation]`, which all sources share in kind but not in object.

        Raises:
            ValueError: no such estimator or teacher, or an option that it does not have or refuses.
        """
        # The teacher is a rule, which no table of an estimator can hold.
        given: dict[str, Any] = {}
        if self.imitation.teacher:
            teacher = build("imitation.teacher", RULES, {"name": self.imitation.teacher, **self.imitation.options})
            given = {"teacher": teacher, "imitation": self.imitation.weight, "follow": self.imitation.follow}
        return build("estimator", ESTIMATORS, source.estimator, **given)

    def build_loggers(self) -> list[Logger]:
        """The loggers of the run, which have not begun; their clients need not be installed yet.

        Raises:
            ValueError: no such logger, or an option that it does not have.
        """
        return [build(f"loggers[{i}]", LOGGERS, options) for i, options in enumerate(self.loggers)]
