"""Few-shot comparisons: a learned start, and how it goes on from there, against fine-tuning of other starts.

Fine-tuning goes on from random weights and from weights that were trained on all tasks jointly, by SGD or Adam with a
learning rate that is the best of a grid on other tasks (the pool "outer_valid"), for each column by itself. All rows of
a column are of the same tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from lopt.core.random import derive_seeds, make_generator
from lopt.core.schema import list_options
from lopt.evaluation.statistics import Ratio, Summary, compare_paired, keep_finite, summarize
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, LearnedInit, Rule
from lopt.tasks import TASKS, TaskFamily

RATES = tuple(10 ** (k / 4) for k in range(-16, 3))
OPTIMIZERS = ("sgd", "adam")
TUNING_TASKS = 64
JOINT_STEPS = 1000
RANDOM, JOINT = "random start", "joint start"

OnWork = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True)
class FewShotCell:
    """One row's figure in one column.

    Attributes:
        loss: over held-out tasks, on the whole split that the family is judged on.
        ratio: of the first row's mean to this one's, paired by task; None in the first row.
        tuned: optimizer and learning rate; "" where nothing was tuned.
        curve: mean loss before the first step and after each, None where it is not finite.
    """

    loss: Summary
    ratio: Ratio | None
    tuned: str
    curve: list[float | None]


@dataclass(frozen=True)
class FewShot:
    """A table: a column for each number of examples and steps, a row for the rule and for each kind of fine-tuning.

    Attributes:
        task: description of the family, as trained.
        tasks: that every figure is a mean over.
        columns: (shots, steps).
        rows: cells by label, the rule's first.
    """

    task: str
    tasks: int
    columns: list[tuple[int, int]]
    rows: dict[str, list[FewShotCell]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_few_shot(
    label: str,
    rule: Rule,
    family: TaskFamily,
    shots: Sequence[int],
    steps: Sequence[int],
    *,
    tasks: int = 600,
    seed: int = 0,
    on_work: OnWork | None = None,
) -> FewShot:
    """Adapt to held-out tasks, from the rule's start and from others.

    Args:
        label: of the rule.
        rule: for models of the family.
        family: that it was trained on, with an option `shots`.
        shots, steps: examples of a task, and steps on them; every pair is a column.
        tasks, seed: of the pool "test".
    Raises:
        ValueError: the family has no `shots`, or the rule is for another model.
    """
    tell = on_work or (lambda text: None)
    tell("training all tasks jointly")
    joint = train_jointly(family, seed)
    found: dict[str, list[tuple[Tensor, str, list[float | None]]]] = {label: [], RANDOM: [], JOINT: []}
    columns = [(k, n) for k in shots for n in steps]
    for k, n in columns:
        own = with_shots(family, k)
        contenders = {label: [rule], RANDOM: [RULES[name]() for name in OPTIMIZERS]}
        contenders[JOINT] = [wrap_start(joint, name) for name in OPTIMIZERS]
        for row, rules in contenders.items():
            tell(f"{row}: {k} shots, {n} steps")
            chosen, tuned = (rules[0], "") if row == label else tune(rules, own, n, seed)
            curves = run_curves(chosen, own, torch.arange(tasks), n, seed=seed)
            means = [keep_finite(x) for x in curves.losses.double().mean(1)]
            found[row].append((curves.final.double(), tuned, means))
    ours = [_as_numbers(values) for values, _, _ in found[label]]
    rows = {
        row: [
            FewShotCell(
                summarize(numbers := _as_numbers(values)),
                None if row == label else compare_paired(ours[i], numbers),
                tuned,
                means,
            )
            for i, (values, tuned, means) in enumerate(cells)
        ]
        for row, cells in found.items()
    }
    return FewShot(family.describe(), tasks, columns, rows)


def with_shots(family: TaskFamily, shots: int) -> TaskFamily:
    """The family with so many examples of each task to learn from.

    Raises:
        ValueError: it has no option for that.
    """
    if "shots" not in family.config:
        few = [name for name, kind in TASKS.items() if "shots" in list_options(kind)]
        raise ValueError(f"few shots are for families with an option shots ({', '.join(few)}), not {family.name!r}")
    return TASKS[family.name](**{**family.config, "shots": shots})


def train_jointly(
    family: TaskFamily, seed: int, *, steps: int = JOINT_STEPS, learning_rate: float = 3e-3
) -> LearnedInit:
    """Weights that are trained on all tasks together, as one: an initialisation that is learned for no step at all."""
    generator = make_generator(derive_seeds(seed, "joint"))
    params = family.init(family.sample(generator), generator)
    rule = LearnedInit({name: list(p.shape) for name, p in params.items()}, "sgd", {"lr": 0.0})
    rule.set_initial(params)
    config = TrainerConfig(
        steps=steps,
        tasks=25,
        learning_rate=learning_rate,
        train_only=["init.*"],
        seed=seed,
        validate_every=steps,
        validation_tasks=100,
        validation_steps=1,
    )
    estimator = ESTIMATORS["full"](num_steps=1, objective="final", objective_split=family.judged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # joint weights that are no better than random ones are a result
        trained = Trainer(rule, family, estimator, config).run()
    assert isinstance(trained, LearnedInit)
    return trained


def tune(
    rules: Sequence[Rule],
    family: TaskFamily,
    steps: int,
    seed: int,
    *,
    grid: Sequence[float] = RATES,
    tasks: int = TUNING_TASKS,
) -> tuple[Rule, str]:
    """The best of some optimizers with the best of some learning rates, on tasks of the pool "outer_valid".

    Args:
        rules: with a meta-weight `lr`, or `inner.lr`.
    Returns:
        The rule with that rate, and what it is.
    """
    best: tuple[float, Rule, str] | None = None
    ids = torch.arange(tasks).repeat(len(grid))
    for rule in rules:
        key = "inner.lr" if isinstance(rule, LearnedInit) else "lr"
        rates = torch.tensor(grid, dtype=torch.float32).repeat_interleave(tasks)
        options = {"seed": seed, "stream": "few-shot tuning", "pool": "outer_valid"}
        curves = run_curves(rule, family, ids, steps, meta_weights={key: rates}, **options)  # type: ignore[arg-type]
        for rate, mean in zip(grid, curves.final.double().view(len(grid), -1).mean(1).tolist(), strict=True):
            mean = mean if isfinite(mean) else inf
            if best is None or mean < best[0]:
                name = rule.inner.name if isinstance(rule, LearnedInit) else rule.name
                best = mean, _set_rate(rule, key, rate), f"{name}, lr {rate:.2g}"
    assert best is not None
    return best[1:]


def wrap_start(joint: LearnedInit, name: str) -> LearnedInit:
    """The joint weights with another optimizer to go on."""
    rule = LearnedInit({key: list(shape) for key, shape in joint.shapes.items()}, name)
    rule.set_initial(joint.initial_params)
    return rule


def _set_rate(rule: Rule, key: str, rate: float) -> Rule:
    """A copy with this learning rate."""
    if isinstance(rule, LearnedInit):
        copy: Rule = wrap_start(rule, rule.inner.name)
    else:
        copy = RULES[rule.name](**rule.config)
    copy.load_state_dict(rule.state_dict() | {key: torch.tensor(rate, dtype=torch.float32)})
    return copy


def _as_numbers(values: Tensor) -> list[float | None]:
    return [keep_finite(x) for x in values]
