"""Sweeps that are killed at random moments, again and again, end as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_cases import TINY, describe_result

from lopt.cli.sweep.study import SweepStudy
from lopt.meta.trainer.checkpoint import RULE
from lopt.rules.files import fingerprint, load

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kills")]
KILLS = 5
ARGUMENTS = ["tiny.toml", "--vary", "trainer.learning_rate=1e-3,1e-2,0.1", "--out", "s"]


def launch(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    (folder / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "lopt", "sweep", *arguments, "--workers", "2"]
    output = (folder / "output.txt").open("a")
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
    )


def describe_sweep(folder: Path) -> dict[str, Any]:
    reports = {report.name: report for report in SweepStudy(folder).list_reports()}
    trials = {name: describe_result(folder / name) for name in reports}
    for trial in trials.values():
        trial["card"].pop("command")  # the one that began it: of the sweep, or of its resume
    return {"reports": reports, "trials": trials, "rule": fingerprint(load(folder / RULE))}


def count_steps(folder: Path) -> int:
    logs = [path.read_text() for path in folder.glob("trial-*/metrics.jsonl")]
    return sum(log.count('"kind": "train"') for log in logs)


def run_to_end(folder: Path, *arguments: str) -> None:
    process = launch(folder, *arguments)
    assert process.wait(timeout=600) == 0, (folder / "output.txt").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """How many steps a sweep makes that is not killed, and what it leaves."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(folder, *ARGUMENTS)
    return count_steps(folder / "s"), describe_sweep(folder / "s")


@pytest.mark.parametrize("seed", range(6))
def test_a_sweep_killed_five_times_ends_as_one_that_was_not(
    whole: tuple[int, dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    chance, (steps, expected), arguments = random.Random(seed), whole, ARGUMENTS
    for target in sorted(chance.sample(range(steps), KILLS)):
        process = launch(tmp_path, *arguments)
        while count_steps(tmp_path / "s") < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        if (tmp_path / "s" / "trial-000").exists():
            arguments = ["--resume", "s"]
    run_to_end(tmp_path, *arguments)
    found = describe_sweep(tmp_path / "s")
    for name, trial in expected["trials"].items():
        assert found["trials"][name] == trial
    assert found == expected
