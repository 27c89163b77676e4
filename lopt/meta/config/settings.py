"""What a run's rule is judged on when it is trained: settings, each a task family and a length of the runs."""

from __future__ import annotations

from typing import NamedTuple

from lopt.core.schema import conform
from lopt.meta.config.build import build
from lopt.meta.config.run import RunConfig
from lopt.rules import RULES, HandDesigned
from lopt.tasks import TASKS, TaskFamily


class Setting(NamedTuple):
    """What a rule is judged on, once.

    Attributes:
        title: for readers; None for a description of the task.
        family: whose held-out tasks are trained.
        num_steps: length of the runs.
    """

    title: str | None
    family: TaskFamily
    num_steps: int


def list_settings(config: RunConfig) -> list[Setting]:
    """Every family of the run at its evaluation's lengths, then the variants at the first of them.

    The first setting is one that the rule was trained for. A variant changes options of the first family's task, or
    names a task of its own.

    Raises:
        ValueError: a variant has a title that is no string, or an option that its task does not accept.
    """
    evaluation, families = config.evaluation, config.list_families()
    settings = []
    for source in families:
        family = source.build_task()
        for i, steps in enumerate(evaluation.steps):
            title = f"{source.name}: {steps} steps" if i else f"{source.name}: as trained, {steps} steps"
            settings.append(Setting(title, family, steps))
    for variant in evaluation.variants:
        changes = dict(variant)
        title = conform(changes.pop("title", ""), str, "evaluation.variants: title")
        title = title or ", ".join(f"{key} {value}" for key, value in changes.items())
        changed = build("task", TASKS, changes if "name" in changes else families[0].task | changes)
        settings.append(Setting(f"{changed.name}: {title}", changed, evaluation.steps[0]))
    return settings


def check_label(label: str) -> str:
    """Make sure that a name can stand for a rule in the same table as the baselines.

    Returns:
        `label` itself.
    Raises:
        ValueError: a hand-designed optimizer is called so.
    """
    name = label.partition(",")[0]  # Adam with its default rate is called "adam, lr 0.001"
    if name in RULES and issubclass(RULES[name], HandDesigned):
        raise ValueError(f"a rule cannot be called {label!r}: a baseline is called so; give it another name")
    return label
