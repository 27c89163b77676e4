"""Paths and texts as people have them: odd names work, impossible ones are one clear line, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_cases import TINY, make_config

from lopt.core.documents import MAX_DEPTH, read_json, read_toml
from lopt.meta.runs.folder import start_run
from lopt.meta.runs.lock import LOCK, OWNER
from lopt.rules import RULES
from lopt.rules.files import save

LONG = "n" * 300


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TINY)
    save(RULES["linear"](), "linear.safetensors")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("broken").symlink_to("nowhere")
    Path("bad.toml").write_bytes(b"\xff\xfename = 3")
    Path("deep.toml").write_text(TINY + "\nzz = " + "[" * 900 + "]" * 900)
    Path("deepest.toml").write_text("zz = " + "[" * 100_000 + "]" * 100_000)
    Path("folder/config.json").write_text('{"a":' * 3000 + "1" + "}" * 3000)
    Path("folder/environment.json").write_text("{}")
    Path("taken").mkdir()
    Path("taken/config.json").mkdir(parents=True)
    Path("dir.toml").mkdir()
    Path("dir.safetensors").mkdir()
    return tmp_path


def list_all() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.name not in (LOCK, OWNER))


TRAIN = ["train", "t.toml", "--no-eval", "--set", "trainer.steps=1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN, "--out", "t.toml"], "t.toml: File exists"),
        ([*TRAIN, "--out", "t.toml/run"], "t.toml/run: Not a directory"),
        ([*TRAIN, "--out", "loop"], "loop"),
        ([*TRAIN, "--out", "loop/run"], "loop"),
        ([*TRAIN, "--out", "broken"], "broken"),
        ([*TRAIN, "--out", LONG], "File name too long"),
        ([*TRAIN, "--out", "taken"], "taken holds a run already"),
        (["train", "bad.toml"], "bad.toml is not a TOML file"),
        (["train", "deep.toml"], f"deep.toml is not a TOML file: it is nested more than {MAX_DEPTH} deep"),
        (["train", "deepest.toml"], f"nested more than {MAX_DEPTH} deep"),
        (["train", "dir.toml"], "dir.toml"),
        (["train", "loop.toml"], "loop.toml"),
        (["train", LONG], "no preset is called"),
        (["train", LONG + ".toml"], "n.toml"),
        (["train", "t.toml", "--set", "task." + "a." * 900 + "b=1"], "override looks like"),
        (
            ["train", "t.toml", "--set", "trainer.steps=" + "[" * 900 + "]" * 900],
            "trainer.steps must be a whole number",
        ),
        (["train", "--resume", "folder"], "config.json is damaged: it is nested more than"),
        (["train", "--resume", "t.toml"], "no run in t.toml"),
        (["train", "--resume", "loop"], "loop"),
        (["train", "--resume", "taken"], "no run in taken"),
        (["train", "--resume", LONG], "name too long|no run in"),
        (["sweep", "--resume", "loop"], "loop"),
        (["sweep", "t.toml", "--vary", "trainer.learning_rate=1,2", "--out", "t.toml"], "t.toml"),
        (["sweep", "t.toml", "--vary", "trainer.learning_rate=1,2", "--out", LONG], "name too long"),
        (["inspect", "dir.safetensors"], "dir.safetensors"),
        (["inspect", "loop"], "loop"),
        (["inspect", LONG], "no shipped rule|name too long"),
        (["report", "loop"], "loop"),
        (["report", LONG], "name too long|holds neither"),
        (["demo", "--out", "t.toml"], "t.toml"),
        (["import", "dir.safetensors", "--rule", "mlp", "-o", "x.safetensors"], "is a folder"),
        (["import", "loop", "--rule", "mlp", "-o", "x.safetensors"], "loop"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--out", "t.toml"], "t.toml"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--archive", "t.toml", "--out", "."], "t.toml"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_impossible_paths_and_texts_are_one_line_and_leave_nothing(
    run: Callable[..., Any], arguments: list[str], words: str
) -> None:
    before = list_all()
    result = run(*arguments)
    assert result.status == 2, result.out
    (line,) = result.err.strip().splitlines()
    assert re.search(words, line), line
    assert len(line) < 2100
    assert list_all() == before


@pytest.mark.parametrize("name", ["$HOME", "a b", "ä→", "-x", "[red]", "x" * 200, "a/../b", "CON", "%s", "'", "~"])
def test_odd_names_are_names_like_others(run: Callable[..., Any], name: str) -> None:
    result = run(*TRAIN, f"--out=made/{name}")
    assert result.status == 0, result.err
    assert (Path("made") / name / "rule.safetensors").is_file()
    assert run("train", f"--resume=made/{name}", "--no-eval").status == 0
    assert run("inspect", f"made/{name}", "--no-pictures").status == 0


@pytest.mark.parametrize("name", ["..", ".", "../up", "a/b/../c", "$HOME", LONG, "", "a\nb", "CON"])
def test_a_name_in_a_preset_chooses_no_path(run: Callable[..., Any], in_folder: Path, name: str) -> None:
    Path("named.toml").write_text(f"name = {json.dumps(name)}\n" + TINY)
    beside = sorted(in_folder.parent.iterdir())
    result = run("train", "named.toml", "--no-eval", "--set", "trainer.steps=1")
    assert "Traceback" not in result.err
    if result.status == 0:
        (folder,) = Path("runs").iterdir()
        assert (folder / "rule.safetensors").is_file()
    else:
        assert result.status == 2
        assert len(result.err.strip().splitlines()) == 1
    assert sorted(in_folder.parent.iterdir()) == beside


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfname = 'x'\n")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"name": "x"}')
    assert read_toml(tmp_path / "a.toml") == read_json(tmp_path / "a.json") == {"name": "x"}


def test_texts_are_utf_8_whatever_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    (tmp_path / "a.toml").write_bytes("name = 'ä→'\n".encode())
    assert read_toml(tmp_path / "a.toml") == {"name": "ä→"}


def test_a_working_directory_that_is_gone_is_one_line(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for arguments in (["train", "quadratic-lstm", "--no-eval"], ["report", "x"], ["train", "--resume", "x"]):
        result = run(*arguments)
        assert result.status == 2
        assert len(result.err.strip().splitlines()) == 1
    os.chdir(tmp_path)


def test_a_run_folder_that_goes_during_the_run_ends_it_in_one_line(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopt.meta.trainer.trainer import Trainer

    original = Trainer._step_sources

    def remove(self: Trainer) -> Any:
        shutil.rmtree("r", ignore_errors=True)
        return original(self)

    monkeypatch.setattr(Trainer, "_step_sources", remove)
    result = run("train", "t.toml", "--no-eval", "--out", "r")
    assert result.status == 2
    assert "r/checkpoint.safetensors" in result.err
    assert "No such file" in result.err
    assert "Traceback" not in result.err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_without_permission_is_one_line(run: Callable[..., Any]) -> None:
    Path("closed").mkdir(mode=0o500)
    result = run(*TRAIN, "--out", "closed/run")
    assert result.status == 2
    assert "Permission denied" in result.err
    start_run(make_config(), Path("mine"))
    Path("mine").chmod(0o500)
    result = run("train", "--resume", "mine", "--no-eval")
    Path("mine").chmod(0o700)
    assert result.status == 2
    assert len(result.err.strip().splitlines()) == 1
