"""What the trials of a sweep are: settings that vary, from texts and draws, and the configurations that they make.

Settings are named by dotted keys such as `trainer.learning_rate`, as on the command line.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt.core.schema import conform
from lopt.meta.config.effect import check_effect
from lopt.meta.config.load import parse_config
from lopt.meta.config.overrides import SECTIONS, apply_changes, parse_override, put_value
from lopt.meta.config.run import RunConfig
from lopt.meta.config.samplers import draw_options
from lopt.rules.files import load_card

FIXED = ("name", "description", "task", "source", "evaluation", "loggers", "trainer.validation_")
"""What trials have in common, so that their validations can be compared."""


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        settings: what it has of its own, by dotted keys.
        status: "waiting" (to begin or go on), "done", "halved" (not among the better half) or "failed".
        step, best, best_step: as far as it got: outer steps, best validation so far and its step.
        error: why it failed.
    """

    name: str
    settings: dict[str, Any]
    status: str = "waiting"
    step: int = 0
    best: float | None = None
    best_step: int = 0
    error: str = ""


@dataclass
class Trained:
    """How far a run got, as the card of its rule file says: see `Trainer.save_rule`."""

    trained_steps: int
    best_step: int
    improved: bool
    validation: dict[str, float | None]
    left_out: int
    diverged: int
    seconds: float


def read_outcome(trial: Trial, path: Path) -> None:
    """Take how far a trial got, and how good it is, from its rule file.

    Raises:
        ValueError: the file is damaged, or no rule that a run has left; the trial is as it was.
        OSError: it cannot be read.
    """
    trained: Trained = conform(load_card(path).get("training"), Trained, f"{path}: training")
    if len(trained.validation) != 1:
        raise ValueError(f"{path}: training.validation must have one entry, got {trained.validation!r}")
    trial.step, trial.best_step = trained.trained_steps, trained.best_step
    (trial.best,) = trained.validation.values()


def parse_range(text: str) -> tuple[str, dict[str, Any]]:
    """What a `--vary` of the command line says: a setting and the values to try.

    Args:
        text: `KEY=A,B,C`, `KEY=LOW:HIGH` or `KEY=LOW:HIGH:log`.
    Returns:
        The dotted key and a sampler, as `lopt.meta.config.samplers` reads it.
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
        low, high = (int(bound) if re.fullmatch(r"[-+]?\d+", bound) else float(bound) for bound in match.groups()[:2])
        return key, {"low": low, "high": high, "log": match[3] is not None}
    _, choices = parse_override(f"x=[{values}]")
    if isinstance(choices, str):  # bare words are not TOML, one by one they are strings
        choices = [parse_override(f"x={value}")[1] for value in values.split(",")]
    return key, {"choose": choices}


def draw_settings(
    varied: Sequence[tuple[str, Mapping[str, Any]]], samples: int | None, seed: int
) -> list[dict[str, Any]]:
    """The settings of all trials by dotted keys; numbers of four digits, whole between whole bounds.

    Raises:
        ValueError: nothing varies, or a key twice; a range without `samples`; a sampler is not understood.
    """
    samplers = dict(varied)
    if not varied or len(samplers) < len(varied):
        raise ValueError(f"a sweep varies one or more different settings, got {[key for key, _ in varied]}")
    if samples is None:
        for key, sampler in varied:
            if "choose" not in sampler:
                raise ValueError(f"{key} is a range: say how many trials are to be drawn (--samples)")
        return [
            dict(zip(samplers, values, strict=True))
            for values in itertools.product(*(s["choose"] for s in samplers.values()))
        ]
    # Drawn like the options of task families, by named seeds, and spread evenly over each range.
    kinds = {
        key: int if "low" in s and isinstance(s["low"], int) and isinstance(s["high"], int) else float
        for key, s in varied
    }
    drawn = draw_options(samplers, kinds, samples, seed, "sweep", "sweep")

    def shorten(key: str, value: Any) -> Any:
        return float(f"{value:.4g}") if "low" in samplers[key] and isinstance(value, float) else value

    # Four digits are enough for a setting, and make equal draws equal.
    rounded = [{key: shorten(key, value) for key, value in settings.items()} for settings in drawn]
    return list({json.dumps(settings): settings for settings in rounded}.values())


def make_config(config: Mapping[str, Any], trial: Trial) -> RunConfig:
    """The configuration of a trial's run: that of the sweep with the trial's settings, and one thread, as trials share
    the processors.

    Args:
        config: of the sweep, as plain data, which is left as it is.
    Raises:
        ValueError: a setting is unknown, out of range or without effect.
    """
    raw: dict[str, Any] = json.loads(json.dumps(config))
    changes = [(tuple(key.split(".")), value) for key, value in trial.settings.items()]
    apply_changes(raw, [*changes, (("trainer", "threads"), 1)])
    made, given = parse_config(raw), dict[str, Any]()
    for path, value in changes:
        put_value(given, path, value)
    check_effect(made, given)
    return made


def check_config(config: RunConfig) -> None:
    """Build what a run is made of, as far as this costs no time, so that a sweep is refused before its first trial
    begins and not by its tenth.

    Raises:
        ValueError: something cannot be built.
    """
    config.build_rule()
    for logger in config.build_loggers():
        logger.check()
    for source in config.list_sources():
        source.transform(source.build_task())
        source.build_horizon()
        config.build_estimator(source)
