"""The presets of control: they resume, and a learned start does after few steps what others take many for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_cases import check_resume

from lopt.evaluation.control import follow_returns
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES
from lopt.rules.files import load
from lopt.tasks.control.control import Control

SMALL = ["task.length=4", "task.pairs=2", "trainer.tasks=2", "trainer.steps=4", "trainer.validation_tasks=1"]
RARE = ["trainer.validate_every=2", "trainer.checkpoint_every=2"]


@pytest.mark.parametrize("preset", ["control-arm", "control-reacher"])
def test_it_resumes_bitwise(preset: str, tmp_path: Path) -> None:
    if preset == "control-reacher":
        pytest.importorskip("mujoco.batch", reason="pip install lopt[control]")
        pytest.importorskip("gymnasium", reason="pip install lopt[control]")
    check_resume(load_config(preset, [*SMALL, *RARE]), tmp_path, stop=3, resumes=2)


def test_a_learned_start_of_a_pendulum_is_ahead_of_learning_from_scratch(tmp_path: Path) -> None:
    sizes = ["task.system=pendulum", "task.length=25", "task.pairs=8", "trainer.tasks=8", "trainer.steps=60"]
    config = load_config("control-arm", [*sizes, "trainer.validate_every=60", "trainer.validation_tasks=4"])
    trainer = start_run(config, tmp_path / "run")
    trainer.run()
    family = config.list_families()[0].build_task()
    assert isinstance(family, Control)
    learned = follow_returns(load(trainer.rule_path), family, 8, 3)
    scratch = follow_returns(RULES["sgd"](lr=0.3), family, 8, 10)
    assert learned[3].mean() > scratch[10].mean()


def test_returns_are_final_losses_in_another_unit() -> None:
    family, rule = Control(length=5, pairs=2), RULES["sgd"](lr=0.3)
    returns = follow_returns(rule, family, 3, 4)
    assert returns.shape == (5, 3)
    final = run_curves(rule, family, torch.arange(3), 4).final
    torch.testing.assert_close(returns[4], -5 * final.double())
    assert not torch.equal(returns[3], returns[4])
