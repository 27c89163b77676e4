"""What the trials of a sweep are: settings that vary, as Optuna's distributions, and the configurations that they make.

Settings are named by dotted keys such as `trainer.learning_rate`, as on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lopt.meta.config.effect import check_effect
from lopt.meta.config.load import parse_config
from lopt.meta.config.overrides import SECTIONS, apply_changes, parse_override, put_value
from lopt.meta.config.run import RunConfig

FIXED = ("name", "description", "task", "source", "evaluation", "loggers", "trainer.validation_")
"""What trials have in common, so that their validations can be compared."""

Space = dict[str, BaseDistribution]
"""What varies, by dotted key. Choices that are lists or tables, which Optuna does not keep, are JSON texts."""


def parse_space(texts: Sequence[str]) -> Space:
    """What varies, from the texts of the command line.

    Raises:
        ValueError: nothing, a setting twice, or what `parse_range` refuses.
    """
    ranges = [parse_range(text) for text in texts]
    if not ranges or len(dict(ranges)) < len(ranges):
        raise ValueError(f"a sweep varies one or more different settings, got {[key for key, _ in ranges]}")
    return dict(ranges)


def parse_range(text: str) -> tuple[str, BaseDistribution]:
    """What a `--vary` of the command line says: a setting and what it may be.

    Args:
        text: `KEY=A,B,C`, `KEY=LOW:HIGH` or `KEY=LOW:HIGH:log`; whole numbers between whole bounds.
    Raises:
        ValueError: not of these forms, or of a setting that trials must share.
    """
    key, _, values = (part.strip() for part in text.partition("="))
    if not key or not values:
        raise ValueError(f"what varies is given as KEY=A,B,C or KEY=LOW:HIGH or KEY=LOW:HIGH:log, got {text!r}")
    if "." not in key and key not in SECTIONS:
        key = f"task.{key}"  # as everywhere
    if key == "trainer.threads":
        raise ValueError("every trial of a sweep has one thread: choose how many run at a time with --workers")
    if any(key == fixed or key.startswith(fixed if fixed.endswith("_") else f"{fixed}.") for fixed in FIXED):
        raise ValueError(f"{key} must be the same in all trials, whose validations are compared: use --set")
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    if match := re.fullmatch(rf"({number}):({number})(:log)?", values):
        return key, _make_range(key, match[1], match[2], match[3] is not None)
    _, choices = parse_override(f"x=[{values}]")
    if isinstance(choices, str):  # bare words are not TOML, one by one they are strings
        choices = [parse_override(f"x={value}")[1] for value in values.split(",")]
    return key, CategoricalDistribution([json.dumps(c) if isinstance(c, (list, dict)) else c for c in choices])


def _make_range(key: str, low: str, high: str, log: bool) -> BaseDistribution:
    whole = all(re.fullmatch(r"[-+]?\d+", bound) for bound in (low, high))
    bounds: list[Any] = [(int if whole else float)(bound) for bound in (low, high)]
    if bounds[0] >= bounds[1] or (log and bounds[0] <= 0):
        positive = "0 < " if log else ""
        raise ValueError(f"{key} needs {positive}LOW < HIGH, got {low}:{high}")
    return (IntDistribution if whole else FloatDistribution)(*bounds, log=log)


def decode(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that Optuna's values mean, by dotted key."""
    return {k: json.loads(v) if isinstance(v, str) and v.startswith(("[", "{")) else v for k, v in params.items()}


def list_ends(distribution: BaseDistribution) -> list[Any]:
    """All choices, or the bounds of a range."""
    kind: Any = distribution
    return list(kind.choices) if isinstance(kind, CategoricalDistribution) else [kind.low, kind.high]


def make_config(config: Mapping[str, Any], params: Mapping[str, Any]) -> RunConfig:
    """The configuration of a trial's run: that of the sweep with the trial's settings, and one thread, as trials share
    the processors.

    Args:
        config: of the sweep, as plain data, which is left as it is.
        params: of Optuna.
    Raises:
        ValueError: a setting is unknown, out of range or without effect.
    """
    raw: dict[str, Any] = json.loads(json.dumps(config))
    changes = [(tuple(key.split(".")), value) for key, value in decode(params).items()]
    apply_changes(raw, [*changes, (("trainer", "threads"), 1)])
    made, given = parse_config(raw), dict[str, Any]()
    for path, value in changes:
        put_value(given, path, value)
    check_effect(made, given)
    return made


def check_space(config: Mapping[str, Any], space: Space) -> None:
    """Build what runs are made of, as far as this costs no time, with every choice and bound once, so that a sweep is
    refused before its first trial begins and not by its tenth.

    Raises:
        ValueError: something cannot be built.
        ImportError: the client of a logger is not installed.
    """
    first = {key: list_ends(distribution)[0] for key, distribution in space.items()}
    others = [first | {key: end} for key, distribution in space.items() for end in list_ends(distribution)[1:]]
    for params in (first, *others):
        made = make_config(config, params)
        made.build_rule()
        for source in made.list_sources():
            source.transform(source.build_task())
            source.build_horizon()
            made.build_estimator(source)
    for logger in made.build_loggers():
        logger.check()
