"""The evaluation that belongs to a run: its rule against tuned baselines on the settings of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lopt.config import RunConfig
from lopt.evaluate import Comparison, compare
from lopt.evaluate.baselines import OnSearch
from lopt.rules import Rule


def judge(
    config: RunConfig,
    rules: Mapping[str, Rule],
    *,
    archive: Path,
    on_setting: Callable[[str], None] | None = None,
    on_search: OnSearch | None = None,
) -> list[Comparison]:
    """Compare `rules` with tuned baselines on the task of the run, its horizons and its variants.

    Args:
        rules: by label, the one in question first.
        archive: folder of tuned baselines, filled where they are missing.
        on_setting: told the title of each setting before it is run.
        on_search: told of each search for a learning rate that is not archived.
    Returns:
        The first is the setting that the rule was trained for.
    """
    evaluation = config.evaluation
    settings: list[tuple[str, dict[str, Any], int]] = [
        (f"{steps} steps" if i else f"as trained, {steps} steps", {}, steps) for i, steps in enumerate(evaluation.steps)
    ]
    for variant in evaluation.variants:
        changes = dict(variant)
        title = changes.pop("title", None) or ", ".join(f"{k} {v}" for k, v in changes.items())
        settings.append((title, changes, evaluation.steps[0]))
    comparisons = []
    for title, changes, steps in settings:
        if on_setting:
            on_setting(title)
        family = config.build_task(**changes)
        comparisons.append(
            compare(
                rules,
                family,
                steps,
                evaluation.seeds,
                title=f"{config.task['name']}: {title}",
                archive=archive,
                on_search=on_search,
            )
        )
    return comparisons


def summarize_results(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """What a training card says of an evaluation: per setting the rule's losses and the best tuned baseline's."""
    results = []
    for comparison in comparisons:
        ours = comparison.subject
        line: dict[str, Any] = {
            "setting": comparison.title,
            "task": comparison.task,
            "steps": comparison.num_steps,
            "seeds": comparison.num_seeds,
        }
        for figure in ("final", "mean"):
            best = comparison.find_bar(figure)
            line[figure] = {
                "rule": _mean(ours.summarize(figure)),
                "best_tuned": _mean(best.summarize(figure)) if best else None,
                "best_tuned_name": best.label if best else None,
            }
        results.append(line)
    return results


def _mean(summary: Any) -> float | None:
    return None if summary is None or summary.mean is None else float(f"{summary.mean:.4g}")
