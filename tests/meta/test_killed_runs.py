"""Runs in processes of their own: killed and resumed bitwise, or stopped politely."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import TINY, hash_state, make_config, timeless

from lopt.core.files import load_state
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    start_run(make_config(), folder).run()
    return folder


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lopt", "train", "--no-eval", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(m["step"] >= step for m in read_metrics(path)):
            return
        time.sleep(0.002)


def kill_and_resume(tmp_path: Path, times: int, seed: int) -> Path:
    """Run the tiny configuration, killed `times` times at random moments, to its end."""
    chance = random.Random(seed)
    (tmp_path / "tiny.toml").write_text(TINY)
    folder = tmp_path / "run"
    arguments = ["tiny.toml", "--out", "run"]
    kills = 0
    for attempt in range(times):
        process = launch(tmp_path, *arguments)
        wait_for_step(folder, 1 + attempt * 24 // times, process)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        output, _ = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (folder / "config.json").exists():
            arguments = ["--resume", "run"]
        assert "Traceback" not in output, output
    assert kills >= 1
    process = launch(tmp_path, *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return folder


def test_a_killed_run_resumes_bitwise(uninterrupted: Path, tmp_path: Path) -> None:
    folder = kill_and_resume(tmp_path, times=2, seed=0)
    assert hash_state(folder) == hash_state(uninterrupted)
    assert timeless(folder) == timeless(uninterrupted)
    assert not list(folder.glob("*.tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_twenty_runs_killed_three_times_resume_bitwise(uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    folder = kill_and_resume(tmp_path, times=3, seed=seed)
    assert hash_state(folder) == hash_state(uninterrupted)
    assert timeless(folder) == timeless(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(uninterrupted: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    process = launch(tmp_path, "tiny.toml", "--out", "run", "--set", "trainer.steps=100000")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)  # it ends only if the signal is heard: hours of steps are left
    assert process.returncode == 130
    assert "lopt train --resume run" in output
    assert "Traceback" not in output
    _, metadata = load_state(tmp_path / "run" / CHECKPOINT)
    assert metadata["step"] == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 3
