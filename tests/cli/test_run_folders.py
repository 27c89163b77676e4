"""Run folders: one process at a time, and two checkpoints, of which one may be damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from training_cases import TINY, hash_state, make_config, timeless

from lopt.core.files import load_state
from lopt.meta.runs.folder import resume_run, start_run
from lopt.meta.runs.lock import LOCK, hold_folder
from lopt.meta.trainer.checkpoint import CHECKPOINT, PREVIOUS, RULE
from lopt.meta.trainer.ranks import Ranks


@contextmanager
def hold_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder; it is killed at the end."""
    code = f"""
from pathlib import Path
from lopt.meta.runs.lock import hold_folder
with hold_folder(Path({str(folder)!r})):
    print("held", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted; its checkpoints are of steps 24 and 20."""
    folder = tmp_path_factory.mktemp("whole")
    start_run(make_config(), folder).run()
    return folder


def copy_run(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in whole.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


# -- one process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["train", "--resume", "r"], ["demo", "--out", "r"], ["train", "t.toml", "--out", "r"]]
)
def test_a_second_process_in_a_run_folder_is_refused_in_one_line_and_changes_nothing(
    run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TINY)
    folder = copy_run(whole, tmp_path / "r")
    if "t.toml" in command:  # begun by the other process at the same time: there is no run yet
        for path in folder.iterdir():
            path.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with hold_elsewhere(folder) as other:
        result = run(*command)
    assert result.status == 2
    (line,) = result.err.strip().splitlines()
    assert line.startswith(f"lopt: error: r is in use by process {other.pid} on ")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name[1:] not in ("lock", "owner")} == before


def test_what_a_killed_process_leaves_in_a_folder_blocks_nobody(tmp_path: Path) -> None:
    with hold_elsewhere(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).exists()
        with hold_folder(tmp_path):
            pass


def test_a_folder_is_held_until_its_last_holder_in_the_process_leaves(tmp_path: Path) -> None:
    other = FileLock(tmp_path / LOCK, timeout=0)
    with hold_folder(tmp_path):
        with hold_folder(tmp_path):
            pass
        with pytest.raises(TimeoutError):
            other.acquire()
    with other:
        pass


def test_rank_0_alone_holds_the_folder_of_a_run_of_several_processes(whole: Path, tmp_path: Path) -> None:
    class Follower(Ranks):
        def lead(self, make: Callable[[], Any]) -> Any:  # rank 0 did it
            return {"config": make_config().to_dict(), "command": "lopt train", "saved": False}

    folder = copy_run(whole, tmp_path / "run")
    with ExitStack() as held:
        resume_run(folder, Follower(1, 2), held=held)
        with FileLock(folder / LOCK, timeout=0):
            pass
    with ExitStack() as held:
        resume_run(folder, held=held)
        with pytest.raises(TimeoutError):
            FileLock(folder / LOCK, timeout=0).acquire()


def test_reading_a_run_takes_no_lock(run: Callable[..., Any], whole: Path) -> None:
    with hold_elsewhere(whole):
        assert run("report", str(whole)).status == 0


# -- two checkpoints ---------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "another file": lambda path: path.write_bytes((path.parent / RULE).read_bytes()),
}


def test_the_last_two_checkpoints_are_kept(whole: Path) -> None:
    assert [load_state(whole / name)[1]["step"] for name in (CHECKPOINT, PREVIOUS)] == [24, 20]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_whose_last_checkpoint_is_damaged_ends_bitwise_from_the_one_before(
    whole: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = copy_run(whole, tmp_path / "run")
    damage(folder / CHECKPOINT)
    with pytest.warns(UserWarning, match=r"goes on from the one before, .*checkpoint.previous.safetensors, at step 20"):
        trainer = resume_run(folder)[1]
    if (folder / CHECKPOINT).exists():
        trainer.save()
        assert [load_state(folder / name)[1]["step"] for name in (CHECKPOINT, PREVIOUS)] == [20, 20]
    trainer.run()
    assert hash_state(folder) == hash_state(whole)
    assert timeless(folder) == timeless(whole)


@pytest.mark.parametrize("damage", [flip_a_bit, DAMAGES["empty"]], ids=["a flipped bit", "empty"])
def test_a_run_with_two_damaged_checkpoints_is_refused_in_one_line(
    run: Callable[..., Any], whole: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = copy_run(whole, tmp_path / "run")
    damage(folder / CHECKPOINT)
    damage(folder / PREVIOUS)
    result = run("train", "--resume", str(folder), "--no-eval")
    assert result.status == 2
    (line,) = result.err.strip().splitlines()
    assert line.startswith("lopt: error: no checkpoint can be read: ")
    assert f"{folder / CHECKPOINT} is" in line
    assert f"{folder / PREVIOUS} is" in line
