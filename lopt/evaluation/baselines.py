"""Tuned baselines: hand-designed optimizers with their learning rates searched on a grid, and the archive of searches.

The grid is tried on a few tasks, its best learning rates on many more: near the edge of stability a learning rate
that is best on ten tasks may fail on one of the next twenty, and a baseline tuned like that is no baseline. A grid
times its tasks runs as one population, through per-run meta-weights. Tuning tasks are never among the reported
ones. A search is archived under a hash of all that determines it and is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, log10
from pathlib import Path
from typing import Any

import torch

from lopt.core.documents import read_json
from lopt.core.files import write_atomic
from lopt.core.names import choose
from lopt.core.random import derive_seeds
from lopt.core.version import VERSION
from lopt.meta.unroll.curves import run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.rules.building_blocks.hand_designed import SCHEDULES
from lopt.tasks import TaskFamily

BASELINES = ("sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "nadamw")
CRITERIA = ("final", "mean")
FORMAT = 1
"""Of an archived search; raised when a baseline, a loss or the search itself changes its meaning."""

EXTENSION = 4
EXPONENT_LIMIT = 80
STREAM = "tuning"
SHIPPED = Path(__file__).parent / "tuned"
"""The package's own searches: those of `lopt demo`, so that nobody waits for them."""

logger = logging.getLogger(__name__)

OnWork = Callable[[str], None]
"""Told what begins: "tuning adam, cosine: 35 learning rates x 8 seeds x 100 steps", "running adam"."""


@dataclass(frozen=True)
class Grid:
    """Learning rates to search: `ratio^k` for k = low, ..., high; the defaults span five decades.

    A search that finds its best at an end of the grid goes on beyond it, so the bounds say only where it begins.

    Attributes:
        ratio: of neighbours; sqrt(2) for small tasks, 10^0.5 is usual for large ones.
        low, high: first and last exponent, before any extension; within +-80.
    """

    ratio: float = 2**0.5
    low: int = -26
    high: int = 8

    def __post_init__(self) -> None:
        if not self.ratio > 1:
            raise ValueError(f"ratio must be above 1, got {self.ratio}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if max(-self.low, self.high) > EXPONENT_LIMIT:
            raise ValueError(f"exponents must be within +-{EXPONENT_LIMIT}, got {self.low} and {self.high}")

    @property
    def decades(self) -> float:
        """Orders of magnitude from the first to the last learning rate, to compare a grid with those of papers, which
        usually say how many decades they have searched.
        """
        return (self.high - self.low) * log10(self.ratio)

    def value(self, exponent: int) -> float:
        """The learning rate of an exponent, which may be beyond `low` and `high`, rounded to 9 digits: equal on every
        machine, so that archived searches and their repetitions name the same learning rates.
        """
        return float(f"{self.ratio**exponent:.9g}")


@dataclass(frozen=True)
class Tuning:
    """How baselines are tuned: with which learning rates and schedules, and on how many tasks.

    Attributes:
        grid: the learning rates.
        num_seeds: tasks that the finalists are tried on, an eighth of them (at least 4) for the whole grid; None
            takes more of them where tasks are smaller.
        seed: names those tasks.
        finalists: for each criterion the best this many must have been tried on all tasks.
        schedules: of the learning rate, each tuned by itself.
    """

    grid: Grid = Grid()
    num_seeds: int | None = None
    seed: int = 0
    finalists: int = 4
    schedules: tuple[str, ...] = SCHEDULES

    def __post_init__(self) -> None:
        if self.num_seeds is not None and self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}")
        if self.finalists < 1:
            raise ValueError(f"finalists must be at least 1, got {self.finalists}")
        if not self.schedules or set(self.schedules) - set(SCHEDULES):
            raise ValueError(f"schedules must be some of {SCHEDULES}, got {self.schedules}")

    def count_seeds(self, family: TaskFamily) -> int:
        """How many tasks decide between the finalists on a family.

        Returns:
            `num_seeds`, if it is given; otherwise 32 to 512, fewer the more parameters a task has and few where a
            gradient takes rollouts, which bounds the cost of a search.
        """
        if family.black_box:
            return self.num_seeds or 32
        return self.num_seeds or min(512, max(32, 2**16 // max(family.spec.size, 1)))


@dataclass(frozen=True)
class Candidate:
    """One learning rate of a search, with what it came to on the first `num_seeds` tuning tasks.

    Attributes:
        exponent: of the grid's ratio.
        lr: the learning rate itself.
        final, mean: loss at the end of the run and over the run, averaged over tasks; None where one is not finite.
        diverged: number of tasks on which the run diverged.
    """

    exponent: int
    lr: float
    num_seeds: int
    final: float | None
    mean: float | None
    diverged: int


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search: one optimizer with one schedule on one setting.

    Attributes:
        settings: all that determined it.
        trials: the candidates, in the order of the learning rate; the name is that in archived files.
        best: the learning rate with the lowest loss for each of `CRITERIA`; None if none stayed finite.
        fingerprint: of the settings and the tasks.
        lopt_version: that made it.
    """

    settings: dict[str, Any]
    trials: list[Candidate]
    best: dict[str, float | None]
    fingerprint: str
    lopt_version: str

    def lowest(self, criterion: str) -> float:
        """The loss of the best learning rate by a criterion, to choose between the schedules of an optimizer.

        Args:
            criterion: one of `CRITERIA`.
        Returns:
            Its loss averaged over the tuning tasks, infinite if no learning rate stayed finite.
        """
        best = _pick_best(self.trials, criterion)
        return float("inf") if best is None else float(getattr(best, criterion))


def tune_baseline(
    name: str,
    schedule: str,
    family: TaskFamily,
    num_steps: int,
    tuning: Tuning = Tuning(),
    archive: Path | None = None,
    on_work: OnWork | None = None,
) -> Tuned:
    """Search the learning rate of `RULES[name]`, or take the search from the archive.

    The grid is extended on the side where the best value of either criterion is an edge. A learning rate with a
    task whose loss is not finite is out; ties go to the smaller one.

    Args:
        name: one of `BASELINES`.
        schedule: of the learning rate over the run, one of `SCHEDULES`.
        family, num_steps: the setting: what is trained, and for how long.
        archive: folder of earlier searches, made if missing, beside that of the package; None keeps nothing.
        on_work: called before a search that is not in the archive.
    Raises:
        ValueError: `name` is not a hand-designed optimizer.
    """
    choose("baseline", name, BASELINES)
    # Everything that the outcome depends on: an archived search with any of it changed is another search.
    num_seeds = tuning.count_seeds(family)
    settings = {
        "format": FORMAT,
        "task": family.describe(),
        "num_steps": num_steps,
        "rule": RULES[name](schedule=schedule).describe(),
        "schedule": schedule,
        "grid": asdict(tuning.grid),
        "num_seeds": num_seeds,
        "finalists": tuning.finalists,
        "seed": tuning.seed,
    }
    # The name is for people, its last part decides; what is in the file is compared in full.
    fingerprint = _fingerprint(settings, family, num_seeds, tuning.seed)
    file = f"{family.name}-{name}-{schedule}-{fingerprint[:12]}.json"
    path = None if archive is None else archive / file
    if archived := load_tuned(path, fingerprint) or load_tuned(SHIPPED / file, fingerprint):
        return archived
    if on_work is not None:
        count = tuning.grid.high - tuning.grid.low + 1
        on_work(f"tuning {name}, {schedule}: {count} learning rates x {num_seeds} seeds x {num_steps} steps")
    # Both criteria come out of the same runs, so one search serves both.
    candidates = _search(name, schedule, family, num_steps, tuning)
    best = {criterion: _pick_best(candidates, criterion) for criterion in CRITERIA}
    tuned = Tuned(
        settings,
        candidates,
        {key: None if candidate is None else candidate.lr for key, candidate in best.items()},
        fingerprint,
        VERSION,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(asdict(tuned), indent=1, allow_nan=False) + "\n").encode())
    return tuned


def load_tuned(path: Path | None, fingerprint: str) -> Tuned | None:
    """An archived search, if it may stand for a new one.

    A file that cannot be trusted is left where it is and named in a logged warning; the caller tunes again and replaces
    it.

    Args:
        path: of the JSON file; None for no archive.
        fingerprint: of the settings and tasks that are asked for.
    Returns:
        None if there is no file, if it is damaged, or if it belongs to other settings or another choice of the best.
    """
    if path is None or not path.exists():
        return None
    try:
        content = read_json(path)
        candidates = [Candidate(**candidate) for candidate in content.pop("trials")]
        tuned = Tuned(trials=candidates, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("archived tuning %s is damaged (%s); tuning again", path, error)
        return None
    # The best is computed again: a file in which it was changed by hand does not name another learning rate.
    best = {c: t.lr if (t := _pick_best(candidates, c)) else None for c in CRITERIA}
    if tuned.fingerprint != fingerprint or tuned.best != best:
        logger.warning("archived tuning %s belongs to other settings; tuning again", path)
        return None
    return tuned


def _search(name: str, schedule: str, family: TaskFamily, num_steps: int, tuning: Tuning) -> list[Candidate]:
    """The grid on a few tasks, then finalists on all, until no learning rate that is not tried looks better."""
    full = tuning.count_seeds(family)
    few = min(full, max(4, full // 8))
    candidates: dict[int, Candidate] = {}

    def try_rates(exponents: Iterable[int], num_seeds: int) -> None:
        todo = sorted(exponents)
        new = _try_rates(name, schedule, family, num_steps, tuning, todo, num_seeds)
        candidates.update(zip(todo, new, strict=True))

    # Few tasks leave out what is hopeless; only what may win is tried on all, as the few best may have been lucky.
    todo = set(range(tuning.grid.low, tuning.grid.high + 1))
    while todo:
        try_rates(todo, few)
        while promising := _pick_finalists(candidates.values(), tuning.finalists, full):
            try_rates(promising, full)
        todo = _extend(candidates)
    return [candidates[k] for k in sorted(candidates)]


def _pick_finalists(candidates: Iterable[Candidate], count: int, full: int) -> set[int]:
    """Of the best `count` for either criterion those that were not tried on all tasks."""
    exponents = set()
    for criterion in CRITERIA:
        for candidate in _rank(candidates, criterion)[:count]:
            if candidate.num_seeds < full:
                exponents.add(candidate.exponent)
    return exponents


def _extend(candidates: Mapping[int, Candidate]) -> set[int]:
    """What to try beyond an edge that is best; where nothing is finite, smaller learning rates."""
    low, high = min(candidates), max(candidates)
    best = [_pick_best(candidates.values(), criterion) for criterion in CRITERIA]
    edges = {low if candidate is None else candidate.exponent for candidate in best}
    below = range(max(low - EXTENSION, -EXPONENT_LIMIT), low) if low in edges else ()
    above = range(high + 1, min(high + EXTENSION, EXPONENT_LIMIT) + 1) if high in edges else ()
    return {*below, *above}


def _try_rates(
    name: str, schedule: str, family: TaskFamily, num_steps: int, tuning: Tuning, exponents: list[int], num_seeds: int
) -> list[Candidate]:
    """All given learning rates on the first `num_seeds` tuning tasks, as one population."""
    # Every run has a learning rate of its own, as meta-weights have a dimension of runs: one batch, not a loop.
    rule = RULES[name](schedule=schedule)
    lrs = torch.tensor([tuning.grid.value(k) for k in exponents], dtype=torch.float64)
    runs = len(lrs) * num_seeds
    weights = {key: w.detach().expand(runs) for key, w in rule.named_parameters()}
    weights["lr"] = lrs.to(weights["lr"].dtype).repeat_interleave(num_seeds)
    curves = run_curves(
        rule,
        family,
        torch.arange(num_seeds).repeat(len(lrs)),
        num_steps,
        meta_weights=weights,
        seed=tuning.seed,
        stream=STREAM,
        pool="outer_valid",
    )

    def average(values: torch.Tensor) -> list[float | None]:
        means = values.double().view(len(lrs), num_seeds).mean(1).tolist()
        return [mean if isfinite(mean) else None for mean in means]

    columns = zip(
        exponents,
        lrs.tolist(),
        [num_seeds] * len(lrs),
        average(curves.final),
        average(curves.mean),
        curves.diverged.view(len(lrs), num_seeds).sum(1).tolist(),
        strict=True,
    )
    return [Candidate(*column) for column in columns]


def _rank(candidates: Iterable[Candidate], criterion: str) -> list[Candidate]:
    """Those that are finite, the lowest loss first."""
    finite = [candidate for candidate in candidates if getattr(candidate, criterion) is not None]
    return sorted(finite, key=lambda candidate: (getattr(candidate, criterion), candidate.exponent))


def _pick_best(candidates: Iterable[Candidate], criterion: str) -> Candidate | None:
    """The best: after the last round of a search it has been tried on all tasks."""
    ranked = _rank(candidates, criterion)
    return ranked[0] if ranked else None


def _fingerprint(settings: dict[str, Any], family: TaskFamily, num_seeds: int, seed: int) -> str:
    """Hash of the settings and of what tuning seed 0 starts from.

    The start tells apart tasks that describe themselves alike, such as a user's modules on different data.
    """
    loop = InnerLoop(RULES["sgd"](), family, int(derive_seeds(seed, STREAM)))
    slots = loop.start(torch.arange(1))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (slots.params, *loop.batch(slots).values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(f"{float(slots.loss):.2e}".encode())
    return digest.hexdigest()
