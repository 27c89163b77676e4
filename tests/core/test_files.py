"""Files of tensors: what is written is read back bit for bit, and a kill or an error leaves a whole file."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import limit_file_size
from torch import Tensor, nn

from lopt.core.files import MAX_HEADER, load_state, save_state, write_atomic
from lopt.core.random import make_generator


def test_state_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=make_generator(0))
    tensors = {
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "scalar": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "bf16": base.bfloat16(),
        "fp64": base.double() / 3,
        "strided": base.T[::2],
        "expanded": torch.ones(1).expand(5),
        "shared": base,
        "shared again": base[1:],
        "weight": nn.Parameter(base),
    }
    metadata = {"step": 3, "best": None, "names": ["a", {"b": 1.5}], "ü": "é"}
    path = save_state(tmp_path / "state.safetensors", tensors, metadata)
    read, read_metadata = load_state(path)
    assert read_metadata == metadata
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].shape == value.shape
        assert read[name].dtype == value.dtype
        assert as_bytes(read[name]) == as_bytes(value)


def as_bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_state_without_tensors_is_read_back(tmp_path: Path) -> None:
    assert load_state(save_state(tmp_path / "x", {}, {"step": 0})) == ({}, {"step": 0})


def test_names_and_metadata_beyond_the_limit_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exceed"):
        save_state(tmp_path / "x", {}, {"text": "x" * MAX_HEADER})
    assert not any(tmp_path.iterdir())


def test_full_disk_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "x", b"old")
    with limit_file_size(100_000), pytest.raises(OSError, match=r"nothing was changed.*x'") as caught:
        write_atomic(path, b"n" * 200_000)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), KeyboardInterrupt()], ids=repr)
def test_whatever_fails_the_old_file_stays_and_no_other_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = write_atomic(tmp_path / "x", b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        write_atomic(tmp_path / "x", b"new")


def test_file_is_synchronised_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "x", b"new")
    assert calls[:2] == [3, "replace"]
    assert len(calls) == 3  # and the folder last


def test_new_file_has_the_usual_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    path = write_atomic(tmp_path / "x", b"new")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    link = tmp_path / "link"
    link.symlink_to(path)
    write_atomic(link, b"newer")
    assert link.is_symlink()
    assert path.read_bytes() == b"newer"


def test_next_write_removes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    stale = tmp_path / f".x.{child}.tmp"
    others = [tmp_path / f".y.{child}.tmp", tmp_path / f".x.{os.getppid()}.tmp", tmp_path / ".x.notes.tmp"]
    for path in (stale, *others):
        path.write_bytes(b"")
    path = write_atomic(tmp_path / "x", b"new")
    assert set(tmp_path.iterdir()) == {path, *others}


def test_killed_at_any_time_leaves_the_old_or_the_new_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for value in (0, 1):
        save_state(tmp_path / str(value), {"x": torch.full((1_000_000,), float(value))}, {"value": value})
    contents = [(tmp_path / str(value)).read_bytes() for value in (0, 1)]
    begin = time.perf_counter()
    write_atomic(path, contents[0])
    duration = time.perf_counter() - begin
    seen, interrupted = set(), 0
    for attempt in range(300):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for content in contents:
                        write_atomic(path, content)
            finally:
                os._exit(1)
        time.sleep(duration * (0.5 + attempt / 7))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, metadata = load_state(path)
        assert bool((tensors["x"] == metadata["value"]).all())
        seen.add(metadata["value"])
        interrupted += len(list(tmp_path.glob(".*.tmp")))
        if attempt >= 30 and seen == {0, 1} and interrupted:
            break
    assert seen == {0, 1}
    assert interrupted > 0  # some kills came within a write
    write_atomic(path, contents[0])
    assert not list(tmp_path.glob(".*.tmp"))
