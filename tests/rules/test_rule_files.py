"""Rule files: found by name or path, read back as they were, refused when damaged, foreign or unfit for a rule."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lopt.core import files as core_files
from lopt.core.files import encode_file, load_state, save_state, write_atomic
from lopt.core.random import make_generator
from lopt.rules import RULES, LearnedInit, Rule, files
from lopt.rules.files import fingerprint, load, load_card, save


def make_rule() -> Rule:
    return RULES["lstm"](hidden=3, seed=5)


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    return save(make_rule(), tmp_path / "rule.safetensors", {"tasks": "quadratic"})


def write_rule(path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A whole rule file with whatever is given."""
    return write_atomic(path, encode_file("rule", tensors, {"rule": name, "config": config, "card": {}}))


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


def test_starts_have_names_of_their_own_and_load_by_them(shipped: Path) -> None:
    (shipped / "starts").mkdir()
    save(LearnedInit({"w": [2]}), shipped / "starts" / "lines.safetensors", {"name": "lines"})
    assert files.list_starts() == ["lines"]
    assert "lines" not in files.list_rules()
    assert isinstance(load("lines"), LearnedInit)
    assert load_card("lines") == {"name": "lines"}


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


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write.*nowhere"):
        save(make_rule(), tmp_path / "nowhere" / "rule.safetensors")
