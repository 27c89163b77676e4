"""Files: what is written is read back, what is damaged or foreign is refused, and a kill leaves a whole file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from faults import limit_file_size
from torch import Tensor, nn

from lopt.core import files as core_files
from lopt.core.files import MAX_HEADER, encode_file, load_state, save_state, write_atomic
from lopt.core.random import make_generator
from lopt.rules import RULES, Rule, files
from lopt.rules.files import fingerprint, load, load_card, save


def make_rule() -> Rule:
    return RULES["lstm"](hidden=3, seed=5)


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    return save(make_rule(), tmp_path / "rule.safetensors", {"tasks": "quadratic"})


def write_rule(path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A whole rule file with whatever is given."""
    return write_atomic(path, encode_file("rule", tensors, {"rule": name, "config": config, "card": {}}))


# -- there and back --------------------------------------------------------------------------------


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


def test_rule_is_read_back_with_its_configuration_and_card(rule_file: Path) -> None:
    rule = load(rule_file)
    assert rule.describe() == make_rule().describe()
    for name, weight in make_rule().state_dict().items():
        assert torch.equal(rule.state_dict()[name], weight)
    assert load_card(rule_file) == {"tasks": "quadratic"}
    assert load(str(rule_file)).config == rule.config


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    card = {"a": 1, "b": 2, "c": 3}
    contents = {save(make_rule(), tmp_path / str(i), card).read_bytes() for i in range(8)}
    assert len(contents) == 1


def test_rule_file_is_plain_safetensors_with_prefixed_names(rule_file: Path) -> None:
    with safetensors.safe_open(rule_file, "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"rule"}  # noqa: SIM118
        about = json.loads(file.metadata()["lopt"])
    assert (about["format"], about["rule"], about["config"]["hidden"]) == (1, "lstm", 3)


def test_fingerprint_tells_meta_weights_and_configurations_apart(rule_file: Path) -> None:
    rule = make_rule()
    own = fingerprint(rule)
    assert re.fullmatch("[0-9a-f]{16}", own)
    assert fingerprint(load(rule_file)) == own
    rule.b_out.data += 1e-7
    others = {fingerprint(rule), fingerprint(RULES["lstm"](3, 0.02, seed=5)), fingerprint(RULES["adam"]())}
    assert len({own, *others}) == 4


def test_save_refuses_what_load_would_refuse(tmp_path: Path) -> None:
    class Adam(RULES["adam"]):  # type: ignore[misc]
        pass

    class Unknown(RULES["adam"]):  # type: ignore[misc]
        name = "unknown"

    changed = RULES["lstm"](hidden=4)
    changed.config["hidden"] = 5
    for rule, message in ((Adam(), "Register"), (Unknown(), "has no rule 'unknown'"), (changed, r"w_hh1.*\[20, 5\]")):
        with pytest.raises(ValueError, match=message):
            save(rule, tmp_path / "rule.safetensors")
    assert not any(tmp_path.iterdir())


def test_names_and_metadata_beyond_the_limit_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exceed"):
        save_state(tmp_path / "x", {}, {"text": "x" * MAX_HEADER})
    assert not any(tmp_path.iterdir())


# -- names -----------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(files, "PRETRAINED", folder)
    for name in ("quadratic-lstm", "digits-lstm"):
        save(make_rule(), folder / f"{name}.safetensors", {"name": name})
    return folder


def test_shipped_rules_are_listed_and_loaded_by_name(shipped: Path) -> None:
    assert files.list_rules() == ["digits-lstm", "quadratic-lstm"]
    for name in files.list_rules():
        assert load(name).name == "lstm"
        assert load_card(name) == {"name": name}


def test_unknown_name_lists_the_nearest_and_all(shipped: Path) -> None:
    with pytest.raises(ValueError, match=r"'digit-lstm'.*mean digits-lstm.*Known: digits-lstm, quadratic-lstm"):
        load("digit-lstm")


def test_file_without_a_suffix_is_found_by_its_path(
    shipped: Path, rule_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rule_file.parent)
    rule_file.rename("mine")
    assert load("mine").name == "lstm"
    assert load(Path("mine")).name == "lstm"


def test_missing_file_is_named(tmp_path: Path) -> None:
    for read in (load, load_card, load_state):
        with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors"):
            read(tmp_path / "nothing.safetensors")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)


# -- damaged and foreign files ---------------------------------------------------------------------


def test_truncated_file_is_refused_at_any_length(rule_file: Path) -> None:
    data = rule_file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        rule_file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r" is truncated|not a safetensors file"):
            load(rule_file)


def test_longer_file_is_refused(rule_file: Path) -> None:
    rule_file.write_bytes(rule_file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load(rule_file)


@pytest.mark.parametrize("part", ["header", "data"])
def test_any_changed_byte_is_refused(rule_file: Path, part: str) -> None:
    data = rule_file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = make_generator(0)
    low, high = (0, header) if part == "header" else (header, len(data))
    where = torch.randint(low, high, (100,), generator=generator).tolist()
    flips = torch.randint(1, 256, (100,), generator=generator).tolist()
    for at, flip in zip(where, flips, strict=True):
        rule_file.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        for read in (load, load_card):
            with pytest.raises(ValueError, match=str(rule_file)):
                read(rule_file)
    rule_file.write_bytes(data)
    load(rule_file)


def test_changed_padding_and_letter_case_of_the_checksum_are_refused(rule_file: Path) -> None:
    """Two changes that leave the parsed header as it is."""
    data = rule_file.read_bytes()
    digest = re.search(rb"[0-9a-f]{64}", data)
    assert digest is not None
    upper = data.replace(digest[0], digest[0].upper(), 1)
    header = 8 + int.from_bytes(data[:8], "little")
    spaced = header.to_bytes(8, "little") + data[8:header] + b" " * 8 + data[header:]
    for changed in (upper, spaced):
        assert changed != data
        rule_file.write_bytes(changed)
        with pytest.raises(ValueError, match="checksum"):
            load(rule_file)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pkl", ""])
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickles_are_refused_and_not_executed(tmp_path: Path, suffix: str, kind: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / f"rule{suffix}"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(Payload(marker), path)
    for read in (load, load_card, load_state):
        with pytest.raises(ValueError, match=f"not a safetensors file but a {kind}.*Nothing of it was executed"):
            read(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload works
    assert marker.exists()


def frame(header: bytes, length: int | None = None) -> bytes:
    """A safetensors header and no data."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header


FOREIGN = {
    "empty": (b"", "empty"),
    "text": (b"just some text", "starts with"),
    "huge header": (frame(b"{", 11_000_000), "not a safetensors"),
    "no tensors": (frame(b"{}"), "not one of lopt"),
    "no JSON": (frame(b"{]"), "header cannot be read"),
    "deep JSON": (frame(b'{"":' + b"[" * 200_000), "header cannot be read"),
    "infinite size": (frame(b'{"a": {"data_offsets": [0, Infinity]}}'), "header cannot be read"),
    "size of 1 EB": (frame(b'{"__metadata__": {"lopt": "{}"}, "a": {"data_offsets": [0, %d]}}' % 10**18), "damaged"),
    "another program's": (safetensors.torch.save({"w": torch.ones(2)}), "not one of lopt"),
    "no object": (safetensors.torch.save({"w": torch.ones(2)}, {"lopt": "[]"}), "not one of lopt"),
    "no format": (safetensors.torch.save({"w": torch.ones(2)}, {"lopt": "{}"}), "format"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_refused(tmp_path: Path, name: str) -> None:
    data, message = FOREIGN[name]
    path = tmp_path / "rule.safetensors"
    path.write_bytes(data)
    for read in (load, load_card, load_state):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_newer_format_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(core_files, "FORMAT", 2)
        path = save(make_rule(), tmp_path / "rule.safetensors")
    with pytest.raises(ValueError, match=r"format 2.*reads formats up to 1.*Upgrade"):
        load(path)


def test_rule_file_is_no_checkpoint_and_a_checkpoint_no_rule_file(tmp_path: Path, rule_file: Path) -> None:
    with pytest.raises(ValueError, match="is a rule file, expected a training checkpoint"):
        load_state(rule_file)
    with pytest.raises(ValueError, match="is a training checkpoint, expected a rule file"):
        load(save_state(tmp_path / "state", {}, {}))


def test_unknown_rule_lists_the_known_ones(tmp_path: Path) -> None:
    path = write_rule(tmp_path / "x", "lsmt", {}, {})
    with pytest.raises(ValueError, match=r"no rule 'lsmt'.*Did you mean lstm.*Known: adam.*sgd"):
        load(path)


@pytest.mark.parametrize("config", [{"hidden": 0}, {"depth": 2}, {"hidden": "20"}, [3], None], ids=str)
def test_configuration_that_the_rule_does_not_accept_is_refused(tmp_path: Path, config: Any) -> None:
    path = write_rule(tmp_path / "x", "lstm", config, {})
    with pytest.raises(ValueError, match="rule 'lstm' does not accept"):
        load(path)


def test_tensors_that_are_not_the_rules_are_refused_by_name(tmp_path: Path) -> None:
    rule = make_rule()
    right = {f"rule.{name}": weight for name, weight in rule.state_dict().items()}
    changes = {
        r"rule.b1: expected float32\[12\], found nothing": {k: v for k, v in right.items() if k != "rule.b1"},
        r"rule.b1: expected float32\[12\], found float32\[11\]": right | {"rule.b1": torch.zeros(11)},
        r"rule.b1: expected float32\[12\], found float64\[12\]": right | {"rule.b1": torch.zeros(12).double()},
        r"rule.b9: expected nothing, found float32\[1\]": right | {"rule.b9": torch.zeros(1)},
        r"init.w: expected nothing": right | {"init.w": torch.zeros(1)},
    }
    for message, tensors in changes.items():
        path = write_rule(tmp_path / "x", "lstm", rule.config, tensors)
        with pytest.raises(ValueError, match=message):
            load(path)


# -- writing ---------------------------------------------------------------------------------------


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


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write.*nowhere"):
        save(make_rule(), tmp_path / "nowhere" / "rule.safetensors")


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
