"""What benches of learned starts share: how a start is read, and how scores are compared by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import click
from torch import Tensor

from lopt.evaluation.settings import read_card
from lopt.evaluation.statistics import summarize
from lopt.meta.trainer.trainer import RULE
from lopt.rules import Rule
from lopt.rules.files import find_longest_run, load, load_card
from lopt.tasks import TaskFamily

F = TypeVar("F", bound=TaskFamily)


@dataclass(frozen=True)
class Start(Generic[F]):
    """A trained start.

    Attributes:
        label: the name of its folder or file.
        family: that it is for.
        steps: that it was trained for.
    """

    label: str
    rule: Rule
    family: F
    steps: int


def load_start(path: Path, kind: type[F], preset: str) -> Start[F]:
    """A start that was trained on a family of this kind.

    Args:
        path: of a run folder or a rule file.
        preset: which trains on it, to name in an error.
    Raises:
        click.ClickException: it is for other tasks.
    """
    file = path / RULE if path.is_dir() else path
    content = load_card(file)
    card = read_card(content)
    family = None if card.config is None else card.config.list_families()[0].build_task()
    if not isinstance(family, kind):
        raise click.ClickException(f"{file} was not trained on {kind.name}; train it with `lopt train {preset}`")
    return Start(path.stem, load(file), family, find_longest_run(content) or 1)


def summarize_gains(scores: Mapping[str, Tensor], first: str, figure: str) -> dict[str, dict[str, float]]:
    """Mean and half of its 95 % interval over tasks, and the same of the gain over a row, paired by task.

    Args:
        scores: of each row, `[N]`, a number for each of the same N tasks.
        first: the row that gains are over.
        figure: what the mean is called.
    """
    rows = {}
    for label, values in scores.items():
        own, gain = summarize(values.tolist()), summarize((values - scores[first]).tolist())
        rows[label] = {
            figure: own.mean or 0.0,
            "interval": 1.96 * (own.stderr or 0.0),
            "gain": gain.mean or 0.0,
            "gain_interval": 1.96 * (gain.stderr or 0.0),
        }
    return rows
