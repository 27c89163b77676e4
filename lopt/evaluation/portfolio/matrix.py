"""Settings on families: how far every setting trains the tasks of every family, at the end and early on.

A score is the mean log of a loss relative to the task's first one, 0 where nothing is learned; a run that is not
finite, or ends far above its start, scores as `WORST`. It is per task, so that what is chosen on a task's first steps
can be judged by the end of the same run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

import torch
from torch import Tensor

from lopt.core.documents import read_json, to_json
from lopt.core.files import write_atomic
from lopt.meta.unroll.curves import run_curves
from lopt.optim.portfolio.setting import Setting
from lopt.rules import HandDesigned
from lopt.tasks import TaskFamily

FLOOR = 1e-5  # of relative losses: below it nobody cares which is lower
FAMILIES = (
    *("quadratic", "rosenbrock", "rastrigin", "lasso", "logistic", "mlp", "tabular", "teacher_student"),
    *("coordinate_mlp", "autoencoder", "vae", "conv", "char_rnn", "char_transformer"),
)
"""What portfolios are chosen on by default: families whose tasks are trained for a hundred steps or more."""

WORST = log(10.0)
STREAM = "portfolio"
SHARES = (0.1, 0.2, 0.4)
"""Of a run, after which its early scores are."""


@dataclass(frozen=True)
class Scores:
    """How J settings do on the S tasks of one family.

    Attributes:
        final: `[J, S]` float64, at the end of the run, on the whole split that the family is judged on.
        early: the same by number of steps, of the batches in the second half of these.
    """

    final: Tensor
    early: dict[int, Tensor]

    @property
    def mean(self) -> Tensor:
        """`[J]`, over the tasks."""
        return self.final.mean(1)


def measure_family(family: TaskFamily, settings: Sequence[Setting], num_steps: int, num_seeds: int) -> Scores:
    """Run every setting on the same tasks of a family.

    Settings of one hand-designed optimizer and schedule run as one population, whose numbers are per-run meta-weights.

    Args:
        settings: of any rules.
        num_steps, num_seeds: length and number of the runs of each.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for j, setting in enumerate(settings):
        kinds.setdefault((setting.rule, str(setting.options.get("schedule"))), []).append(j)
    final = torch.zeros(len(settings), num_seeds, dtype=torch.float64)
    early = {step: torch.zeros_like(final) for step in find_steps(num_steps)}
    for members in kinds.values():
        rule = settings[members[0]].build()
        weights = None
        if isinstance(rule, HandDesigned):
            rows = [dict(settings[j].build().named_parameters()) for j in members]
            columns = {name: torch.stack([row[name].detach() for row in rows]) for name in rows[0]}
            weights = {name: column.repeat_interleave(num_seeds) for name, column in columns.items()}
        runs = 1 if weights is None else len(members)
        seeds = torch.arange(num_seeds).repeat(runs)
        curves = run_curves(rule, family, seeds, num_steps, meta_weights=weights, stream=STREAM)
        first = curves.losses[0].abs().double()
        score = relate(curves.final.double(), first, curves.diverged)
        parts = {}
        for step in early:
            window = curves.losses[step // 2 : step].double()  # as many losses as steps: those before each
            parts[step] = relate(window.mean(0), first, ~window.isfinite().all(0))
        for target, values in ((final, score), *((early[step], part) for step, part in parts.items())):
            target[members] = values.view(runs, num_seeds)
    return Scores(final, early)


def relate(losses: Tensor, first: Tensor, failed: Tensor) -> Tensor:
    """Scores of losses `[N]` relative to first losses, at most `WORST`."""
    scores = (losses.clamp(min=0) / first + FLOOR).log()
    return scores.masked_fill(failed | ~scores.isfinite(), WORST).clamp(max=WORST)


def find_steps(num_steps: int) -> list[int]:
    """The numbers of steps after which runs of `num_steps` have early scores."""
    return sorted({max(1, round(share * num_steps)) for share in SHARES})


def measure_all(
    families: Mapping[str, TaskFamily],
    settings: Sequence[Setting],
    num_steps: int,
    num_seeds: int,
    folder: Path | None = None,
    on_family: Callable[[str], None] | None = None,
) -> dict[str, Scores]:
    """The scores on every family by name; those that `folder` has of the same settings are not measured again.

    Args:
        folder: of a JSON file for each family, made if missing.
        on_family: called with a name before it is measured.
    """
    found = {}
    for name, family in families.items():
        about: dict[str, object] = {"task": family.describe(), "steps": num_steps, "seeds": num_seeds}
        about["settings"] = [asdict(setting) for setting in settings]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = None if folder is None else folder / f"{name}.json"
        scores = None if path is None else _read(path, key)
        if scores is None:
            if on_family is not None:
                on_family(name)
            scores = measure_family(family, settings, num_steps, num_seeds)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            early = {str(step): values.tolist() for step, values in scores.early.items()}
            write_atomic(path, to_json({"key": key, "final": scores.final.tolist(), "early": early}))
        found[name] = scores
    return found


def _read(path: Path, key: str) -> Scores | None:
    """The scores in a file; None where there is none, it is damaged, or it is of other settings."""
    try:
        content = read_json(path)
        if content["key"] != key:
            return None
        early = {int(step): torch.tensor(values, dtype=torch.float64) for step, values in content["early"].items()}
        return Scores(torch.tensor(content["final"], dtype=torch.float64), early)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
