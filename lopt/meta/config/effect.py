"""Settings that nobody would read: a run is not begun with one, since whoever has given it believes in its effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lopt.meta.config.run import RunConfig
from lopt.meta.estimators import Estimator
from lopt.meta.estimators.backprop import Backprop
from lopt.meta.estimators.evolution import Evolution


def check_effect(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Refuse settings without effect.

    Args:
        config: of the run, all that it leaves out filled in.
        given: what the user has given of it, nested as in a file; defaults may be without effect.
    Raises:
        ValueError: there is one; the message says why, and what to do. Or something cannot be built.
    """
    sources = config.list_sources()
    estimators = [config.build_estimator(source) for source in sources]
    for key, reason in (*_find_covered(config, given), *_find_unread(config, given, estimators)):
        raise ValueError(f"{key} has no effect: {reason}")


def _find_covered(config: RunConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What all sources have of their own."""
    own = {
        "task": [bool(source.task) for source in config.source],
        "estimator": ["name" in source.estimator for source in config.source],
        "horizon": [bool(source.horizon) for source in config.source],
        "random_scaling": [source.random_scaling is not None for source in config.source],
        "transforms": [source.transforms is not None for source in config.source],
        "trainer.tasks": [source.tasks is not None for source in config.source],
    }
    for section, having in own.items():
        key = _find_given(given, section)
        if key and having and all(having):
            yield (
                key,
                f"every [[source]] has {section.split('.')[-1]!r} of its own. Change it there, or leave it out there",
            )


def _find_unread(
    config: RunConfig, given: Mapping[str, Any], estimators: Sequence[Estimator]
) -> Iterator[tuple[str, str]]:
    """What depends on another setting, which is not there."""
    for option in ("options", "weight", "follow", "steps"):
        if _find_given(given, f"imitation.{option}") and not config.imitation.teacher:
            yield f"imitation.{option}", "no teacher is imitated. Name one as imitation.teacher"
    if _find_given(given, "horizon") and not any(estimator.draws_horizons for estimator in estimators):
        yield "horizon", "the estimator runs every task for its num_steps. Leave it out, as by --set 'horizon={}'"
    evolution = [estimator for estimator in estimators if isinstance(estimator, Evolution)]
    trainer = config.trainer
    if trainer.capture and not evolution:
        yield "trainer.capture", "it is of evolution strategies, and no estimator is one. Leave it out"
    if trainer.capture and any(estimator.compile for estimator in evolution):
        yield "estimator.compile", "steps are captured in a CUDA graph. Leave out one of the two"
    planned = [x for x in estimators if isinstance(x, Backprop) and x.task_chunk is None and x.checkpoint is None]
    if trainer.memory_mib and not planned:
        reason = "it bounds backpropagation where task_chunk and checkpoint are not given, and there is none"
        yield "trainer.memory_mib", f"{reason}. Leave it out"
    if len(estimators) == 1 and trainer.merge == "pcgrad":
        yield "trainer.merge", "there is one source, whose meta-gradient is against no other. Leave it out"
    if len(estimators) == 1 and config.source and config.source[0].weight != 1:
        yield "source.weight", "there is one source. Leave it out"


def _find_given(given: Any, key: str) -> str:
    """The key of what was given at a place, of its first entry if it is a table; "" for nothing."""
    for part in key.split("."):
        if not isinstance(given, Mapping) or part not in given:
            return ""
        given = given[part]
    if isinstance(given, Mapping):
        return f"{key}.{next(iter(given))}" if given else ""
    return key
