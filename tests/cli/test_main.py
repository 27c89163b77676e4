"""The command line: what it prints, what it leaves behind, and one clear line with exit status 2 for bad input."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch

import lopt
from lopt.cli.program import cli
from lopt.meta.trainer.checkpoint import PREVIOUS
from lopt.meta.trainer.ranks import FailedLead, LostRank
from lopt.meta.trainer.trainer import Interrupted
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
    assert "lopt train tiny.toml --json" in page
    again = run("report", "runs/tiny")
    assert again.status == 0
    assert " ok   dead slots: 0.0%" in again.out
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
    assert "5141" in run("inspect", "lstm.safetensors", "--no-pictures").out
    assert not Path("runs").exists()


def test_inspect_draws_what_the_rule_does_and_says_where(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    result = run("inspect", "linear.safetensors")
    assert result.status == 0, result.err
    names = {"gradient.png", "map.png", "jump.png", "noise.png", "schedule.png"}
    folder = Path("runs/inspect-my-linear-rule")
    assert {path.name for path in folder.iterdir()} == names
    assert all(str(folder / name) in result.out for name in names)
    asked = run("inspect", "linear.safetensors", "--json", "--out", "drawn")
    assert json.loads(asked.out)["state_bytes"] == {"4096": 16, "64x64": 16, "1024x1024": 16}
    assert {path.name for path in Path("drawn").iterdir()} == names


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
        (["train", "digit-lstm"], "digit-lstm.*Did you mean digits-lstm"),
        (["train", "missing.toml"], "no file missing.toml"),
        (["train", "broken.toml"], "not a TOML file"),
        (["train", "tiny.toml", "--set", "trainer.steps=-3"], "trainer.steps.*at least 1.*-3"),
        (["train", "tiny.toml", "--set", "trainer.steps=many"], "trainer.steps must be a whole number, got 'many'"),
        (["train", "tiny.toml", "--set", "trainer.stepz=3"], "stepz.*Did you mean steps"),
        (["train", "tiny.toml", "--set", "rule.hiden=3"], "hiden.*Did you mean hidden"),
        (["train", "tiny.toml", "--set", "rule.name=lstn"], "lstn.*Did you mean lstm"),
        (["train", "tiny.toml", "--set", "trainer"], "override looks like"),
        (["train", "tiny.toml", "--set", "task.dim=0"], "dim must be at least 1"),
        (["train", "tiny.toml", "--set", "imitation.teacher=adm"], "adm.*Did you mean adam"),
        (["train", "tiny.toml", "--out", "tiny.toml/run"], "tiny.toml"),
        (["train", "tiny.toml", "--set", "rule.output_scale=abc"], "rule.output_scale must be a finite number"),
        (["train", "tiny.toml", "--set", "evaluation.seeds=0"], "evaluation.seeds"),
        (["train", "tiny.toml", "--set", "evaluation.variants=[{ dim = 0 }]"], "dim must be at least 1"),
        (["train", "tiny.toml", "--set", "evaluation.variants=[{ dimm = 3 }]"], "dimm.*Did you mean dim"),
        (["train", "tiny.toml", "--set", "evaluation.variants=[{ title = 3 }]"], "title must be a string"),
        (["train", "unnamed.toml"], "task.name"),
        (["train", "tiny.toml", "--set", "name=adam"], "'adam'.*baseline is called so"),
        (["train"], "PRESET or --resume"),
        (["train", "tiny.toml", "--resume", "x"], "nothing else"),
        (["train", "--resume", "nowhere"], "no run in nowhere"),
        (["eval", "digit"], "digit"),
        (["eval", "gone.safetensors"], "gone.safetensors"),
        (["eval", "bomb.safetensors"], "bomb.safetensors.*pickle"),
        (["eval", "cut.safetensors"], "cut.safetensors"),
        (["eval", "linear.safetensors"], "no training card that names a task"),
        (["eval", "linear.safetensors", "--task", "quadratc"], "quadratc.*Did you mean quadratic"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--steps", "0"], "at least 1.*got .0."),
        (["eval", "linear.safetensors", "--task", "quadratic", "--baselines", "adamm"], "adamm.*Did you mean adam"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--set", "dim=2.5"], "task.dim.*whole number.*2.5"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--set", "dim=2\nx=3"], "override looks like"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--out", "tiny.toml/x"], "tiny.toml"),
        (["eval", "linear.safetensors", "--task", "quadratic", "--out", ".", "--archive", "tiny.toml"], "tiny.toml"),
        (["eval", "adam.safetensors", "--task", "quadratic"], "'adam'.*baseline is called so"),
        (["eval", "linear.safetensors", "--task", "module"], "module"),
        (["inspect", "bomb.safetensors"], "pickle"),
        (["inspect", "linear.safetensors", "--out", "tiny.toml"], "tiny.toml"),
        (["report", "nowhere"], "nowhere holds neither a run"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_two(run, arguments: list[str], words: str) -> None:  # type: ignore[no-untyped-def]
    Path("broken.toml").write_text("[task\n")
    Path("unnamed.toml").write_text(TINY.replace('name = "quadratic"\n', ""))
    write_pickle("bomb.safetensors")
    lopt.save(RULES["linear"](), "adam.safetensors")
    Path("cut.safetensors").write_bytes(Path("linear.safetensors").read_bytes()[:-9])
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.status == 2
    last = result.err.strip().splitlines()[-1]
    assert re.search(words, last), result.err
    assert "Traceback" not in result.err
    assert not Path("exploded").exists()
    assert sorted(Path().rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FailedLead("no room"), 2, "lopt: error: no room (on rank 0)"),
        (LostRank("gone"), 1, "lopt: error: gone; the run can go on from its last checkpoint"),
    ],
)
def test_errors_of_other_processes_are_one_line_too(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lopt.meta.runs.training.open_run", fail)
    result = run("train", "tiny.toml")
    assert (result.status, result.err.strip()) == (status, words)


def test_a_run_is_not_overwritten(run) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    before = Path("runs/tiny/checkpoint.safetensors").read_bytes()
    result = run("train", "tiny.toml")
    assert result.status == 2
    assert "--resume" in result.err
    assert Path("runs/tiny/checkpoint.safetensors").read_bytes() == before


def test_demo_does_not_ignore_changes_to_a_run_that_exists(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval", "--out", "runs/demo").status == 0
    before = Path("runs/demo/config.json").read_bytes()
    result = run("demo", "--set", "trainer.steps=9")
    assert result.status == 2
    assert "remove the folder" in " ".join(result.err.split())
    assert Path("runs/demo/config.json").read_bytes() == before


QUICK = ["--task", "quadratic", "--set", "dim=3", "--steps", "5", "--seeds", "2", "--baselines", "sgd, adam"]


def test_evaluations_with_other_settings_go_to_other_folders_and_remember_their_command(run) -> None:  # type: ignore[no-untyped-def]
    for extra in ([], ["--seed", "1"], ["--criterion", "mean"]):
        result = run("eval", "linear.safetensors", *QUICK, *extra)
        assert result.status == 0, result.err
    common = "eval-my-linear-rule-quadratic-dim-3-sgd-adam-steps-5-seeds-2"
    names = {common, f"{common}-seed-1", f"{common}-criterion-mean"}
    assert {path.name for path in Path("runs").glob("eval-*")} == names
    path = Path("runs") / f"{common}-seed-1" / "report.html"
    page = path.read_text()
    assert "--baselines &#39;sgd, adam&#39; --seed 1" in page
    assert run("report", str(path.parent)).status == 0
    assert path.read_text() == page


@pytest.mark.parametrize(
    "card",
    [{"results": "good"}, {"results": [3]}, {"config": 3}, {"config": {"name": "x"}}, {"name": ["x"]}],
)
def test_a_foreign_card_is_ignored_with_a_note(run, card: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    lopt.save(RULES["linear"](), "foreign.safetensors", card)
    for command, options in (("inspect", ["--no-pictures"]), ("eval", QUICK)):
        with pytest.warns(UserWarning, match=r"card of foreign.safetensors is not understood"):
            result = run(command, "foreign.safetensors", *options)
        assert result.status == 0, result.err
    assert [p.name[:12] for p in Path("runs").glob("eval-*")] == ["eval-foreign"]


def test_a_card_chooses_no_path(run, in_folder: Path) -> None:  # type: ignore[no-untyped-def]
    lopt.save(RULES["linear"](), "foreign.safetensors", {"name": "a/b/../../../../z"})
    before = set(in_folder.parent.rglob("*"))
    assert run("eval", "foreign.safetensors", *QUICK).status == 0
    made = set(in_folder.parent.rglob("*")) - before
    assert all((in_folder / "runs") in [p, *p.parents] for p in made)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "null"),
        ("config.json", '{"name": 3}'),
        ("config.json", "{"),
        ("environment.json", "{}"),
        ("environment.json", "[]"),
        ("metrics.jsonl", '{}\n{"kind": "train", "step": 1}\n'),
        ("metrics.jsonl", "1\n"),
        ("metrics.jsonl", "1"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n{"kin\n{"kind": "train", "step": 2}\n'),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n{"kin\n'),
        ("metrics.jsonl", "\x00\n"),
        ("checkpoint.safetensors", None),
    ],
)
def test_a_damaged_run_is_named_and_left_alone(run, name: str, content: str | None) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    path = Path("runs/tiny") / name
    path.unlink()
    (Path("runs/tiny") / PREVIOUS).unlink()
    if content is not None:
        path.write_text(content)
    result = run("train", "--resume", "runs/tiny", "--no-eval")
    assert result.status == 2, result.out
    assert name in result.err
    assert "Traceback" not in result.err
    assert (path.read_text() if path.exists() else None) == content


def test_metrics_without_a_checkpoint_are_not_trained_over(run) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    finished = Path("runs/tiny/metrics.jsonl").read_text()
    for name in ("checkpoint.safetensors", PREVIOUS, "rule.safetensors"):
        (Path("runs/tiny") / name).unlink()
    assert run("train", "--resume", "runs/tiny", "--no-eval").status == 2
    assert Path("runs/tiny/metrics.jsonl").read_text() == finished


def test_a_run_killed_before_its_first_checkpoint_starts_again(run) -> None:  # type: ignore[no-untyped-def]
    assert run("train", "tiny.toml", "--no-eval").status == 0
    finished = Path("runs/tiny/rule.safetensors").read_bytes()
    for name in ("checkpoint.safetensors", PREVIOUS, "rule.safetensors"):
        (Path("runs/tiny") / name).unlink()
    Path("runs/tiny/metrics.jsonl").write_text('{"kind": "validation", "step": 0}\n{"kind": "tra')
    assert run("train", "--resume", "runs/tiny", "--no-eval").status == 0
    assert len(Path("runs/tiny/rule.safetensors").read_bytes()) == pytest.approx(len(finished), abs=50)


@pytest.mark.parametrize("content", ['{"comparisons": 5}', '{"comparisons": [5]}', "[]", "5", "{}", "{"])
def test_a_damaged_evaluation_is_named(run, content: str) -> None:  # type: ignore[no-untyped-def]
    Path("evaluation.json").write_text(content)
    result = run("report", ".")
    assert result.status == 2
    assert re.search("evaluation.json is (damaged|not the JSON of an evaluation): ", result.err)
    assert "Traceback" not in result.err


def test_ctrl_c_while_judging_says_that_the_rule_is_trained(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    Path("one.toml").write_text("\n".join(line for line in TINY.splitlines() if "variants" not in line))
    with monkeypatch.context() as patch:
        patch.setattr("lopt.evaluation.judging.compare", interrupt)
        result = run("train", "one.toml", "--out", "my [red]run")
    assert result.status == 130
    assert "the rule is trained: my [red]run/rule.safetensors" in result.out
    assert "lopt train --resume 'my [red]run'" in result.out
    assert run("train", "--resume", "my [red]run").status == 0
    assert lopt.load_card("my [red]run/rule.safetensors")["results"]


def test_a_run_whose_rule_is_never_finite_is_an_error(run) -> None:  # type: ignore[no-untyped-def]
    preset = TINY.replace('[rule]\nname = "lstm"\nhidden = 3\n', '[rule]\nname = "sgd"\nlr = 1e30\n')
    Path("wild.toml").write_text(preset)
    result = run("train", "wild.toml", "--no-eval", "--json", "--set", "trainer.steps=1")
    assert (result.status, result.out) == (2, "")
    assert "lopt: error: the rule diverges on all" in result.err
    assert "Traceback" not in result.err


def test_a_run_that_never_improves_says_so_in_a_line(run) -> None:  # type: ignore[no-untyped-def]
    changes = ["trainer.learning_rate=1e-30", "trainer.steps=1"]
    with pytest.warns(UserWarning, match="no validation was better than the one before training"):
        result = run("train", "tiny.toml", "--no-eval", *(part for change in changes for part in ("--set", change)))
    assert result.status == 0, result.err
    assert warnings.formatwarning(UserWarning("so"), UserWarning, "file", 3) == "lopt: note: so\n"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("lopt.cli.commands.demo.show_shipped", KeyboardInterrupt()),
        ("lopt.meta.runs.training.run_trainer", Interrupted()),
    ],
)
def test_a_demo_that_is_stopped_names_the_command_that_goes_on(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lopt.cli.commands.demo.show_shipped", lambda *_: None)
    monkeypatch.setattr(what, stop)
    for folder, again in ((), "lopt demo"), (("--out", "d e"), "lopt demo --out 'd e'"):
        result = run("demo", *folder)
        assert result.status == 130
        assert result.out.splitlines()[-1].endswith(f"go on with: {again}")


@pytest.mark.slow
def test_demo_goes_the_whole_way(run) -> None:  # type: ignore[no-untyped-def]
    changes = ["trainer.steps=3", "trainer.validation_tasks=2", "trainer.validation_steps=10", "evaluation.seeds=2"]
    result = run("demo", *(part for change in changes for part in ("--set", change)))
    assert result.status == 0, result.err
    assert "ends at a lower training loss than AdamW as it comes on 3 of 3" in result.out
    assert "test accuracy" in result.out
    for name in ("first.png", "report.html", "curves-1.png", "evaluation.json", "rule.safetensors"):
        assert (Path("runs/demo") / name).stat().st_size > 0
