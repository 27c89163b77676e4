"""Few-shot tables: what is compared, and the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lopt.cli.program import cli
from lopt.evaluation import few_shot
from lopt.evaluation.few_shot import JOINT, RANDOM, compare_few_shot, train_jointly, tune, with_shots
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, LearnedInit
from lopt.tasks import TASKS
from lopt.tasks.sinusoid import Sinusoid

FAMILY = Sinusoid(shots=5, width=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_shot, "JOINT_STEPS", 60)
    monkeypatch.setattr(few_shot, "TUNING_TASKS", 8)
    monkeypatch.setattr(few_shot, "RATES", (1e-3, 1e-2, 1e3))


def test_every_cell_is_of_the_same_held_out_tasks_of_its_shots() -> None:
    rule = train_jointly(FAMILY, 0)
    found = compare_few_shot("mine", rule, FAMILY, [3, 5], [1, 2], tasks=6)
    assert found.columns == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert list(found.rows) == ["mine", RANDOM, JOINT]
    # The joint start is the rule itself here, whose own steps have a rate of 0.
    start = run_curves(rule, with_shots(FAMILY, 3), torch.arange(6), 1)
    assert found.rows["mine"][0].loss.mean == pytest.approx(start.final.double().mean().item())
    assert found.rows["mine"][0].curve[0] == pytest.approx(found.rows[JOINT][0].curve[0])
    assert found.rows["mine"][0].ratio is None
    assert all(cell.tuned.split(",")[0] in ("sgd", "adam") for cell in found.rows[RANDOM])
    assert [len(cell.curve) for cell in found.rows[JOINT]] == [2, 3, 2, 3]


def test_joint_training_is_no_worse_than_chance_and_has_no_step() -> None:
    rule = train_jointly(FAMILY, 0)
    curves = run_curves(rule, FAMILY, torch.arange(50), 2, pool="outer_valid")
    assert torch.equal(curves.losses[0], curves.losses[2])
    random = run_curves(RULES["sgd"](lr=0.0), FAMILY, torch.arange(50), 2, pool="outer_valid")
    assert curves.final.mean() < random.final.mean()


def test_a_rate_that_diverges_is_not_chosen() -> None:
    rule, tuned = tune([RULES["sgd"]()], FAMILY, 5, 0)
    assert tuned in ("sgd, lr 0.001", "sgd, lr 0.01")
    assert rule.meta_weights()["lr"].item() < 0.1


def test_the_command_prints_and_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [
        "task.width=6",
        "trainer.tasks=3",
        "trainer.validation_tasks=4",
        "trainer.steps=2",
        "trainer.validate_every=1",
    ]
    start_run(load_config("sinusoid-maml", sizes), tmp_path / "run").run()
    command = ["eval", "run", "--shots", "2,4", "--steps", "1,3", "--tasks", "5", "--out", "out", "--json"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "few_shot.json").read_text())
    assert found["columns"] == [[2, 1], [2, 3], [4, 1], [4, 3]]
    assert found["tasks"] == 5
    assert "95 % intervals" in result.stderr
    assert (tmp_path / "out" / "few_shot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "0"], "whole numbers of at least 1"),
        (["--shots", "5", "--suite", "development"], "with --shots give"),
        (["--shots", "5", "--tasks", "many"], "whole numbers of at least 1"),
        (["--shots", "5"], "needs"),
    ],
)
def test_options_that_do_not_go_with_shots_are_refused(words: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["eval", "linear", *words])
    assert result.exit_code != 0
    assert message in f"{result.output}{result.exception}"


def test_a_family_without_shots_is_refused() -> None:
    with pytest.raises(ValueError, match=r"option shots.*sinusoid.*quadratic"):
        with_shots(TASKS["quadratic"](), 3)


def test_another_model_is_refused() -> None:
    rule = LearnedInit({"w": [1]})
    with pytest.raises(ValueError, match="another model"):
        compare_few_shot("mine", rule, FAMILY, [2], [1], tasks=2)
