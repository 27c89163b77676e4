"""Rules on a hub: fetched, pinned, kept, pushed; by the real client against a server on the loopback device."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_hub import TOKEN, LocalHub, serve_hub

import lopt
from lopt.rules import RULES, Rule
from lopt.rules.files import fingerprint, save
from lopt.rules.hub import Address, fetch_rule, parse_address, push_folder

constants = pytest.importorskip("huggingface_hub.constants", reason="rules on a hub: extra `hub`")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with the rule `one` of owner `me`, in two commits of which the first has the tag v1."""
    with serve_hub() as found:
        found.tags["me/one", "v1"] = found.commit("me/one", {"rule.safetensors": encode(tmp_path, 1)})
        found.commit("me/one", {"rule.safetensors": encode(tmp_path, 2)})
        point_to(found.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files go by the older protocol, HTTP alone
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield found


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does before the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def make_rule(seed: int) -> Rule:
    return RULES["lstm"](hidden=3, seed=seed)


def encode(folder: Path, seed: int) -> bytes:
    return save(make_rule(seed), folder / "rule.safetensors", {"longest_run": seed}).read_bytes()


def test_addresses_are_read_and_written() -> None:
    assert parse_address("hf://me/my.rule-2") == Address("me/my.rule-2", None)
    for text in ("hf://me/one@v1.0", "hf://me/one@refs/pr/3", "hf://me/one"):
        assert str(parse_address(text)) == text


@pytest.mark.parametrize("text", ["hf://one", "hf://me/one/two", "hf://me/one@", "hf://", "hf://me/../x", "hf://a/b c"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="hf://OWNER/NAME"):
        lopt.load(text)


def test_newest_rule_is_loaded_with_its_card(hub: LocalHub) -> None:
    assert fingerprint(lopt.load("hf://me/one")) == fingerprint(make_rule(2))
    assert lopt.load_card("hf://me/one") == {"longest_run": 2}


def test_optimizer_takes_an_address_and_asks_for_one_state(hub: LocalHub) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = lopt.LearnedOptimizer([p], rule="hf://me/one")
    assert fingerprint(optimizer.rule) == fingerprint(make_rule(2))
    assert optimizer.horizon == 2
    assert len([line for line in hub.asked if line.startswith("HEAD")]) == 1


def test_revision_pins_a_tag_or_a_commit(hub: LocalHub) -> None:
    first = hub.tags["me/one", "v1"]
    for revision in ("v1", first):
        assert fingerprint(lopt.load(f"hf://me/one@{revision}")) == fingerprint(make_rule(1))
    assert fetch_rule("hf://me/one@v1").parent.name == first
    hub.asked.clear()
    lopt.load(f"hf://me/one@{first}")
    assert hub.asked == []  # a commit that is in the cache never changes


def test_without_network_the_copy_in_the_cache_is_taken(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    lopt.load("hf://me/one")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(lopt.load("hf://me/one")) == fingerprint(make_rule(2))
    assert hub.asked == []
    with pytest.raises(ConnectionError, match=r"hf://me/one@v1: HF_HUB_OFFLINE is set, and no copy is in .*cache"):
        lopt.load("hf://me/one@v1")


def test_unreachable_hub_is_told_with_what_to_do(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client's retries
    with pytest.raises(ConnectionError, match=r"the hub cannot be reached, and no copy is in .* path of a rule file"):
        lopt.load("hf://me/one")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://me/none", "no such repository, or it is not open to you: log in"),
        ("hf://me/one@v9", "the repository has no revision 'v9'"),
        ("hf://me/empty", "has no rule.safetensors: it holds no rule of lopt"),
    ],
)
def test_what_the_hub_does_not_have_is_told(hub: LocalHub, text: str, words: str) -> None:
    hub.commit("me/empty", {"pytorch_model.bin": b""})
    with pytest.raises(FileNotFoundError, match=f"{text}: .*{words}"):
        lopt.load(text)


def test_nothing_but_the_rule_file_is_fetched_and_nothing_is_unpickled(hub: LocalHub, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    hub.commit("me/bad", {"rule.safetensors": pickle.dumps(Bomb()), "lopt.py": b"1 / 0", "rule.pkl": b""})
    with pytest.raises(ValueError, match=r"rule\.safetensors is truncated|not a safetensors file"):
        lopt.load("hf://me/bad")
    assert not (tmp_path / "executed").exists()
    assert {line.rpartition("/")[2] for line in hub.asked} == {"rule.safetensors"}


def test_pushed_folder_is_loaded_again(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    save(make_rule(3), folder / "rule.safetensors")
    (folder / "README.md").write_text("# mine\n")
    (folder / "secret.txt").write_text("not for others")
    with pytest.raises(ConnectionError, match="hf://me/new: the hub answers 401: log in by `hf auth login`"):
        push_folder(folder, "me/new")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = push_folder(folder, "me/new", private=True)
    assert set(hub.repositories["me/new"][address.revision or ""]) == {"rule.safetensors", "README.md"}
    assert fingerprint(lopt.load(str(address))) == fingerprint(make_rule(3))
    assert hub.private == {"me/new"}
    save(make_rule(4), folder / "rule.safetensors")
    assert push_folder(folder, "hf://me/new") != address  # the repository is there already
    assert fingerprint(lopt.load("hf://me/new")) == fingerprint(make_rule(4))
    assert fingerprint(lopt.load(str(address))) == fingerprint(make_rule(3))
    with pytest.raises(ValueError, match="without a revision"):
        push_folder(folder, "me/new@v1")


def test_commands_push_and_use_a_rule(
    hub: LocalHub, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushed = run("push", "digits-lstm", "me/digits")
    assert pushed.status == 0, pushed.err
    commit = next(iter(hub.repositories["me/digits"]))
    assert pushed.out == f'lopt.LearnedOptimizer(model.parameters(), rule="hf://me/digits@{commit}")\n'
    page = hub.repositories["me/digits"][commit]["README.md"].decode()
    assert 'rule="hf://me/digits")' in page
    assert run("inspect", "hf://me/digits", "--no-pictures").status == 0
    assert run("export", "hf://me/digits", "plain").status == 0
    assert fingerprint(lopt.load("plain/rule.safetensors")) == fingerprint(lopt.load("digits-lstm"))
    refused = run("push", "digits-lstm", "digits")
    assert refused.status == 2
    assert "hf://OWNER/NAME" in refused.err


def test_a_rule_that_nobody_has_trained_is_told_of(
    hub: LocalHub, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for command in (["push", "lstm", "me/lstm"], ["export", "lstm", "plain"]):
        with pytest.warns(UserWarning, match="'lstm' is an untrained rule: its meta-weights are those that training"):
            assert run(*command).status == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run("export", "digits-lstm", "trained").status == 0
        assert run("export", "adam", "designed").status == 0


def test_settings_of_the_client_are_followed_from_its_start(hub: LocalHub, tmp_path: Path) -> None:
    code = "import lopt; print(lopt.load('hf://me/one').describe())"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == make_rule(2).describe(), done.stderr[-2000:]
    assert list((tmp_path / "home").rglob("rule.safetensors"))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"read by huggingface_hub: pip install .*\[hub\]"):
        lopt.load("hf://me/one")
