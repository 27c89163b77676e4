"""The command line: what it prints, what it leaves behind, and one clear line with exit status 2 for bad input."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

import lopt
from lopt.__main__ import cli, main
from lopt.rules import RULES

TINY = """
[task]
name = "quadratic"
dim = 3
[rule]
name = "lstm"
hidden = 3
[estimator]
name = "truncated"
num_steps = 3
[trainer]
steps = 4
tasks = 2
validate_every = 2
validation_tasks = 2
validation_steps = 5
threads = 1
[evaluation]
seeds = 3
steps = [6]
variants = [{ title = "larger", dim = 4 }]
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "tiny.toml").write_text(TINY)
    lopt.save(RULES["linear"](), "linear.safetensors", {"name": "my linear rule"})
    return tmp_path


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run_command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["lopt", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run_command


def test_train_makes_a_rule_that_the_optimizer_loads(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("train", "tiny.toml", "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    assert told["rule"] == str(Path("runs/tiny/rule.safetensors"))
    assert [r["setting"] for r in told["results"]] == ["quadratic: as trained, 6 steps", "quadratic: larger"]
    assert told["results"][0]["final"]["best_tuned"] > 0
    card = lopt.load_card(told["rule"])
    assert card["results"] == told["results"]
    assert card["command"] == "lopt train tiny.toml --json"
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    lopt.LearnedOptimizer([p], rule=told["rule"]).step()
    assert not torch.equal(p, torch.ones(3))
    page = Path("runs/tiny/report.html").read_text()
    assert "data:image/png;base64" in page
    again = run("report", "runs/tiny")
    assert again.status == 0
    assert Path("runs/tiny/report.html").read_text() == page


def test_eval_judges_a_file_a_run_and_archives_the_baselines(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    options = ["--task", "quadratic", "--set", "dim=3", "--steps", "5", "--seeds", "3", "--baselines", "adam,sgd"]
    result = run("eval", "linear.safetensors", *options, "--json")
    assert result.status == 0, result.err
    (comparison,) = json.loads(result.out)
    assert [e["label"] for e in comparison["entries"]][:3] == ["my linear rule", "adam", "sgd"]
    archived = {p: p.stat().st_mtime_ns for p in Path("runs/baselines").iterdir()}
    assert len(archived) == 4  # two baselines, two schedules
    again = run("eval", "linear.safetensors", *options)
    assert "Adam" in again.out
    assert {p: p.stat().st_mtime_ns for p in Path("runs/baselines").iterdir()} == archived


def test_resume_of_a_finished_run_changes_nothing(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    before = Path("runs/tiny/checkpoint.safetensors").read_bytes()
    assert run("train", "--resume", "runs/tiny", "--no-eval").status == 0
    assert Path("runs/tiny/checkpoint.safetensors").read_bytes() == before


def test_overrides_reach_the_run(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--out", "here", "--seed", "7", "--set", "rule.name=rnnprop", "--set", "trainer.clip=2"]
    assert run("train", "tiny.toml", "--no-eval", *arguments).status == 0
    config = json.loads(Path("here/config.json").read_text())
    assert config["rule"]["name"] == "rnnprop"
    assert config["trainer"]["seed"] == 7
    assert config["trainer"]["clip"] == 2.0
    assert lopt.load("here/rule.safetensors").name == "rnnprop"


def test_list_names_what_there_is(run) -> None:  # type: ignore[no-untyped-def]
    told = json.loads(run("list", "--json").out)
    assert {"lstm", "rnnprop", "adam"} <= set(told["rules"])
    assert {"quadratic", "mlp", "module"} <= set(told["tasks"])
    assert {"digits-lstm", "quadratic-lstm", "demo"} <= set(told["presets"])
    assert all(told["presets"].values())
    assert "digits-lstm" in run("list", "presets").out


def test_inspect_counts_meta_weights_and_state(run) -> None:  # type: ignore[no-untyped-def]
    lopt.save(RULES["lstm"](), "lstm.safetensors")
    facts = json.loads(run("inspect", "lstm.safetensors", "--json").out)
    assert facts["meta_weights"] == 5141  # Andrychowicz et al. 2016
    assert facts["state_bytes_per_parameter"] == 320
    assert "5141" in run("inspect", "lstm.safetensors").out


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands)])
def test_help_explains_every_command(run, command: list[str]) -> None:  # type: ignore[no-untyped-def]
    result = run(*command, "--help")
    assert result.status == 0
    assert "Usage:" in result.out
    assert len(result.out) > 150


def write_pickle(path: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, ("exploded", "w"))  # type: ignore[return-value]

    Path(path).write_bytes(pickle.dumps(Bomb()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digit-lstm"], "digit-lstm.*did you mean digits-lstm"),
        (["train", "missing.toml"], "no file missing.toml"),
        (["train", "broken.toml"], "not a TOML file"),
        (["train", "tiny.toml", "--set", "trainer.steps=-3"], "trainer.steps.*at least 1.*-3"),
        (["train", "tiny.toml", "--set", "trainer.steps=many"], "steps.*int.*str"),
        (["train", "tiny.toml", "--set", "trainer.stepz=3"], "stepz.*did you mean steps"),
        (["train", "tiny.toml", "--set", "rule.hiden=3"], "hiden.*did you mean hidden"),
        (["train", "tiny.toml", "--set", "rule.name=lstn"], "lstn.*did you mean lstm"),
        (["train", "tiny.toml", "--set", "trainer"], "override looks like"),
        (["train", "tiny.toml", "--set", "task.dim=0"], "dim must be at least 1"),
        (["train", "tiny.toml", "--set", "imitation.teacher=adm"], "adm.*did you mean adam"),
        (["train", "tiny.toml", "--out", "tiny.toml/run"], "tiny.toml"),
        (["train"], "PRESET or --resume"),
        (["train", "tiny.toml", "--resume", "x"], "nothing else"),
        (["train", "--resume", "nowhere"], "no run in nowhere"),
        (["eval", "digit"], "digit"),
        (["eval", "gone.safetensors"], "gone.safetensors"),
        (["eval", "bomb.safetensors"], "bomb.safetensors.*pickle"),
        (["eval", "cut.safetensors"], "cut.safetensors"),
        (["eval", "linear.safetensors"], "no training card that names a task"),
        (["eval", "linear.safetensors", "--task", "quadratc"], "quadratc.*did you mean quadratic"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--steps", "0"], "0 is not in the range"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--baselines", "adamm"], "adamm"),
        (["eval", "linear.safetensors", "--task", "module"], "module"),
        (["inspect", "bomb.safetensors"], "pickle"),
        (["report", "nowhere"], "no evaluation in nowhere"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_two(run, arguments: list[str], words: str) -> None:  # type: ignore[no-untyped-def]
    Path("broken.toml").write_text("[task\n")
    write_pickle("bomb.safetensors")
    Path("cut.safetensors").write_bytes(Path("linear.safetensors").read_bytes()[:-9])
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.status == 2
    last = result.err.strip().splitlines()[-1]
    assert __import__("re").search(words, last), result.err
    assert "Traceback" not in result.err
    assert not Path("exploded").exists()
    assert sorted(Path().rglob("*")) == before  # nothing half-written


def test_a_run_is_not_overwritten(run) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    before = Path("runs/tiny/checkpoint.safetensors").read_bytes()
    result = run("train", "tiny.toml")
    assert result.status == 2
    assert "--resume" in result.err
    assert Path("runs/tiny/checkpoint.safetensors").read_bytes() == before


@pytest.mark.slow
def test_demo_goes_the_whole_way(run) -> None:  # type: ignore[no-untyped-def]
    changes = ["trainer.steps=3", "trainer.validation_tasks=2", "trainer.validation_steps=10", "evaluation.seeds=2"]
    result = run("demo", *(part for change in changes for part in ("--set", change)))
    assert result.status == 0, result.err
    assert "test accuracy" in result.out
    for name in ("report.html", "curves-1.png", "evaluation.json", "rule.safetensors"):
        assert (Path("runs/demo") / name).stat().st_size > 0
