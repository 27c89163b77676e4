"""`torchrun -m lopt train`: processes that are killed, asked to stop, or too many."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import pytest
import torch.distributed as dist
from training_cases import TINY, hash_state, timeless

from lopt.core.files import load_state
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.trainer.checkpoint import CHECKPOINT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (dist.is_available() and dist.is_gloo_available()),
    reason="reads /proc, and needs gloo",
)
STEPS = 60
LIMIT = 180


def launch(folder: Path, *arguments: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    (folder / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "-m", "lopt", "train", *(arguments or ["tiny.toml"]), "--no-eval"]
    command += [] if "--resume" in arguments else ["--out", "run", "--set", f"trainer.steps={STEPS}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "USE_LIBUV": "0"}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def find_rank(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise ProcessLookupError(f"there is no rank {rank}")


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    path, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(m["step"] >= step for m in read_metrics(path)):
            return
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    status, output = finish(launch(folder))
    assert status == 0, output
    assert output.count("best on held-out tasks") == 1  # rank 0 alone speaks
    return folder / "run"


def kill_a_rank(folder: Path, rank: int, step: int, delay: float) -> None:
    """Kill a rank when a step is logged; torchrun starts all again, and the run goes on by itself."""
    process = launch(folder, restarts=1)
    wait_for_step(folder, step, process)
    time.sleep(delay)
    os.kill(find_rank(process, rank), signal.SIGKILL)
    status, output = finish(process)
    assert status == 0, output


def test_a_run_of_which_a_rank_was_killed_goes_on_bitwise(uninterrupted: Path, tmp_path: Path) -> None:
    kill_a_rank(tmp_path, 1, 13, 0.0)
    assert hash_state(tmp_path / "run") == hash_state(uninterrupted)
    assert timeless(tmp_path / "run") == timeless(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_runs_of_which_a_rank_was_killed_go_on_bitwise(uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    kill_a_rank(tmp_path, chance.randrange(2), chance.randrange(STEPS - 10), chance.uniform(0, 0.05))
    assert hash_state(tmp_path / "run") == hash_state(uninterrupted)
    assert timeless(tmp_path / "run") == timeless(uninterrupted)


def test_a_signal_ends_all_with_a_checkpoint_from_which_one_process_goes_on(tmp_path: Path) -> None:
    process = launch(tmp_path, "tiny.toml", "--set", "trainer.validate_every=1000000", "--set", "trainer.patience=1")
    wait_for_step(tmp_path, 3, process)
    os.kill(find_rank(process, 1), signal.SIGTERM)
    status, output = finish(process)
    assert status != 0
    assert "lopt train --resume run" in output
    _, metadata = load_state(tmp_path / "run" / CHECKPOINT)
    assert metadata["step"] == read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 3
    status, output = finish(launch(tmp_path, "--resume", "run", processes=1))
    assert status == 0, output
    assert load_state(tmp_path / "run" / CHECKPOINT)[1]["step"] == STEPS


@pytest.mark.slow
def test_damaged_checkpoints_end_all_with_an_error_each(uninterrupted: Path, tmp_path: Path) -> None:
    copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    status, output = finish(launch(tmp_path, "--resume", "run"))
    assert status != 0
    told = [line for line in output.splitlines() if "checkpoint.safetensors is damaged" in line]
    assert len(told) == 2, output
    assert all(line.startswith("lopt: error: ") for line in told)
    assert sum(line.endswith("(on rank 0)") for line in told) == 1
    assert "lopt/" not in output


def test_more_processes_than_slots_are_refused_in_one_line(tmp_path: Path) -> None:
    status, output = finish(launch(tmp_path, processes=4, restarts=1))
    assert status != 0
    assert "lopt: error: 4 processes cannot share 3 tasks (slots): start at most 3" in output
    assert 'File "' not in output.split("ChildFailedError")[0].split("Traceback")[0]
    assert "trainer/trainer.py" not in output
    assert not (tmp_path / "run").exists()
