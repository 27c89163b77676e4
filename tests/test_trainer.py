"""Meta-training runs: they learn, they resume bitwise, they survive kill -9, they stop politely."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lopt.checkpoint import load, load_card, load_state
from lopt.config import RunConfig, parse_config
from lopt.log import read_metrics
from lopt.runs import resume_run, start_run
from lopt.trainer import CHECKPOINT, RULE, Trainer

TINY = """
description = "a tiny run"
[task]
name = "quadratic"
dim = 4
[rule]
name = "rnnprop"
hidden = 4
[estimator]
name = "truncated"
num_steps = 4
[horizon]
name = "curriculum"
stages = [6, 9]
[trainer]
steps = 24
tasks = 3
warmup = 2
validate_every = 6
validation_tasks = 4
validation_steps = 12
checkpoint_every = 5
threads = 1
"""


def make_config(**trainer: object) -> RunConfig:
    from lopt.config import merge, tomllib

    raw = tomllib.loads(TINY) | {"name": "tiny"}
    merge(raw, {"trainer": trainer})
    return parse_config(raw)


def hash_state(folder: Path) -> str:
    """Of everything in the checkpoint but wall-clock time."""
    tensors, metadata = load_state(folder / CHECKPOINT)
    metadata.pop("seconds")
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def timeless(folder: Path) -> list[dict[str, object]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    start_run(make_config(), folder).run()
    return folder


def test_a_short_run_learns_and_keeps_the_best_weights(tmp_path: Path) -> None:
    trainer = start_run(make_config(steps=80, tasks=8, learning_rate=0.03), tmp_path)
    rule = trainer.run()
    validations = [m for m in read_metrics(tmp_path / "metrics.jsonl") if m["kind"] == "validation"]
    finals = [m["final"] for m in validations]
    assert min(finals) < 0.7 * finals[0]
    assert trainer.best == min(finals)
    again = Trainer(load(tmp_path / RULE), trainer.family, trainer.estimator, trainer.config)
    assert again.validate()["final"] == pytest.approx(trainer.best, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), load(tmp_path / RULE).parameters(), strict=True))


def test_run_folder_tells_all(uninterrupted: Path) -> None:
    config = json.loads((uninterrupted / "config.json").read_text())
    assert parse_config(config) == make_config()
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    card = load_card(uninterrupted / RULE)
    assert card["name"] == "tiny"
    assert card["training"]["trained_steps"] == 24
    assert list((uninterrupted / "tensorboard").glob("events*"))
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [m["step"] for m in lines if m["kind"] == "train"] == list(range(1, 25))
    assert {"loss", "meta_loss", "gradient_norm", "skipped_slots", "inner_steps_per_second"} <= set(lines[1])


@pytest.mark.parametrize("stop", [1, 5, 13, 23])
def test_resumed_run_is_bitwise_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path, stop: int) -> None:
    trainer = start_run(make_config(), tmp_path)

    class Stop(Exception):
        pass

    def stop_at(progress: object) -> None:
        if trainer.step == stop:
            raise Stop

    with pytest.raises(Stop):
        trainer.run(stop_at)
    _, resumed = resume_run(tmp_path)
    assert resumed.step <= stop
    assert stop - resumed.step < 5
    resumed.run()
    assert hash_state(tmp_path) == hash_state(uninterrupted)
    assert timeless(tmp_path) == timeless(uninterrupted)


def test_the_seed_matters(uninterrupted: Path, tmp_path: Path) -> None:
    start_run(make_config(seed=1), tmp_path).run()
    assert hash_state(tmp_path) != hash_state(uninterrupted)


def test_the_global_generator_does_not_matter_and_is_left_alone(uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    start_run(make_config(), tmp_path).run()
    assert torch.equal(before, torch.get_rng_state())
    assert hash_state(tmp_path) == hash_state(uninterrupted)


def test_curriculum_is_promoted_only_by_improvements(uninterrupted: Path) -> None:
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    stage, best = 0, float("inf")
    for line in lines:
        if line["kind"] == "validation":
            stage += line["step"] > 0 and line["final"] < best
            best = min(best, line["final"])
        else:
            assert line["horizon_stage"] <= stage
    assert stage > 0


def test_checkpoint_of_another_configuration_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = parse_config(make_config().to_dict() | {"rule": {"name": "linear"}})
    trainer = start_run(other, tmp_path)
    with pytest.raises(ValueError, match="does not belong to this configuration"):
        trainer.restore(uninterrupted / CHECKPOINT)


# -- real processes ------------------------------------------------------------------------------------


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
    begin = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 10
    assert process.returncode == 130
    assert "lopt train --resume run" in output
    assert "Traceback" not in output
    _, metadata = load_state(tmp_path / "run" / CHECKPOINT)
    assert metadata["step"] == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 3
