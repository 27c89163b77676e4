"""A run that dies at any point of its work and is resumed leaves what an uninterrupted one does, to the bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from training_cases import describe_result, fit_init, make_config

from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.estimators.evolution import Evolution
from lopt.meta.runs.folder import CONFIG, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, RULE
from lopt.meta.trainer.log import RunLog


class Killed(BaseException):
    """Not caught by anything, as a kill is not."""


@contextmanager
def die_at(point: int) -> Iterator[list[str]]:
    """Die at the `point`-th of the moments between two changes of what is on the disk.

    Returns:
        The moments that came.
    """
    came: list[str] = []
    replace, log_scalars = os.replace, RunLog.scalars

    def pass_point(what: str) -> None:
        came.append(what)
        if len(came) > point:
            raise Killed

    def write(temporary: Path, path: Path) -> None:
        pass_point(f"before {path.name}")
        replace(temporary, path)
        pass_point(f"after {path.name}")

    def log_line(log: RunLog, kind: str, *rest: Any) -> None:
        if len(came) == point:  # a kill in the middle of a line
            log.lines.file.write('{"kind": "train", "st')
        pass_point(f"before line {kind}")
        log_scalars(log, kind, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", write)
        patch.setattr(RunLog, "scalars", log_line)
        # What no file is compared by, and takes the time.
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(RunLog, "figure", lambda *_: None)
        patch.setattr("torch.utils.tensorboard.SummaryWriter", Mock())
        patch.setattr("lopt.meta.runs.folder.describe_environment", lambda: {"command": "lopt train"})
        yield came


def make_run(estimator: str) -> RunConfig:
    """One whose first validation is the best one, which a second one of the same would take for one in vain."""
    raw = make_config(steps=3, validate_every=2, checkpoint_every=2, patience=2, validation_steps=3).to_dict()
    raw["estimator"] = {"name": estimator, "num_steps": 3}
    if estimator == "full_es":
        raw["estimator"]["num_steps"] = 0
    raw["trainer"] |= {"learning_rate": 1e-30}
    return parse_config(fit_init(raw))


def run_to_end(config: RunConfig, folder: Path) -> None:
    trainer = resume_run(folder)[1] if (folder / CONFIG).exists() else start_run(config, folder)
    trainer.run()


def count_points(estimator: str, folder: Path) -> tuple[list[str], dict[str, Any]]:
    with die_at(10**6) as came:
        run_to_end(make_run(estimator), folder)
    return came, describe_result(folder)


def check_point(estimator: str, folder: Path, point: int, expected: dict[str, Any]) -> None:
    config = make_run(estimator)
    with pytest.raises(Killed), die_at(point):
        run_to_end(config, folder)
    with die_at(10**6):
        run_to_end(config, folder)
    assert describe_result(folder) == expected


def test_a_run_that_dies_at_any_point_ends_as_if_it_had_not(tmp_path: Path) -> None:
    came, expected = count_points("truncated", tmp_path / "whole")
    assert {f"{when} {name}" for when in ("before", "after") for name in (CHECKPOINT, RULE)} <= set(came)
    assert expected["checkpoint"]["validated"] == 3
    for point in range(len(came)):
        check_point("truncated", tmp_path / str(point), point, expected)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "truncated"])
def test_a_run_of_any_estimator_that_dies_ends_as_if_it_had_not(estimator: str, tmp_path: Path) -> None:
    came, expected = count_points(estimator, tmp_path / "whole")
    late = len(came) - 1 - came[::-1].index(f"after {CHECKPOINT}")
    for point in (random.Random(estimator).randrange(late), late):
        check_point(estimator, tmp_path / str(point), point, expected)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_of_any_estimator_that_dies_at_any_point_ends_as_if_it_had_not(estimator: str, tmp_path: Path) -> None:
    came, expected = count_points(estimator, tmp_path / "whole")
    for point in range(len(came)):
        check_point(estimator, tmp_path / str(point), point, expected)


COMPILED = ["truncated", *(name for name, kind in ESTIMATORS.items() if issubclass(kind, Evolution))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "compiled"), [*((name, False) for name in ESTIMATORS), *((name, True) for name in COMPILED)]
)
def test_thirty_runs_of_any_estimator_killed_at_random_end_as_if_they_had_not(
    estimator: str, compiled: bool, tmp_path: Path
) -> None:
    program = Path(__file__).parent.parent / "cases" / "random_kills.py"
    command = [sys.executable, str(program), str(tmp_path), estimator, "30", "0", *(["compile"] if compiled else [])]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 equal" in done.stdout
