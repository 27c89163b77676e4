"""The evaluation that belongs to a run: its rule against tuned baselines on the settings of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lopt.config import RunConfig
from lopt.evaluate import Comparison, Summary
from lopt.tasks import TaskFamily


class Setting(NamedTuple):
    """What a rule is judged on: a title (None for a description of the task), a family and the length of the runs."""

    title: str | None
    family: TaskFamily
    num_steps: int


def list_settings(config: RunConfig) -> list[Setting]:
    """The task of the run at its evaluation's lengths, then the variants at the first of them.

    The first setting is the one that the rule was trained for.
    """
    evaluation, name = config.evaluation, config.task["name"]
    settings = []
    for i, steps in enumerate(evaluation.steps):
        title = f"{name}: {steps} steps" if i else f"{name}: as trained, {steps} steps"
        settings.append(Setting(title, config.build_task(), steps))
    for variant in evaluation.variants:
        changes = dict(variant)
        title = changes.pop("title", None) or ", ".join(f"{key} {value}" for key, value in changes.items())
        settings.append(Setting(f"{name}: {title}", config.build_task(**changes), evaluation.steps[0]))
    return settings


def summarize_results(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """What a training card says of an evaluation: per setting the rule's losses and the best tuned baseline's."""
    results = []
    for comparison in comparisons:
        result: dict[str, Any] = {
            "setting": comparison.title,
            "task": comparison.task,
            "steps": comparison.num_steps,
            "seeds": comparison.num_seeds,
        }
        for figure in ("final", "mean"):
            best = comparison.find_bar(figure)
            result[figure] = {
                "rule": _round_mean(comparison.subject.summarize(figure)),
                "best_tuned": None if best is None else _round_mean(best.summarize(figure)),
                "best_tuned_name": None if best is None else best.label,
            }
        results.append(result)
    return results


def _round_mean(summary: Summary | None) -> float | None:
    return None if summary is None or summary.mean is None else float(f"{summary.mean:.4g}")
