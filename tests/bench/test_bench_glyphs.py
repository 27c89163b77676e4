"""`bench glyphs`: few-shot classifiers on unseen scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.quality import glyphs
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run


def test_starts_and_baselines_are_judged_on_the_same_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROTOTYPE_STEPS", "JOINT_STEPS", "TUNING_STEPS"):
        monkeypatch.setattr(glyphs, name, 2)
    monkeypatch.setattr("lopt.evaluation.classes.fine_tuning.RATES", (1e-2,))
    sizes = ["task.width=2", "task.size=10", "trainer.steps=2", "trainer.tasks=2", "trainer.validation_tasks=2"]
    start_run(load_config("glyphs-maml", [*sizes, "trainer.validate_every=2"]), tmp_path / "run").run()
    out, picture = tmp_path / "found.json", tmp_path / "tasks.png"
    given = [str(tmp_path / "run"), "--tasks", "20", "--steps", "1", "--steps", "2", "--ways", "3"]
    result = CliRunner().invoke(
        glyphs.glyphs, [*given, "--json", str(out), "--picture", str(picture)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    others = [glyphs.PIXELS, glyphs.PROTOTYPES, glyphs.RANDOM, glyphs.JOINT]
    assert {ways: list(rows) for ways, rows in found.items()} == {
        "5": ["run, 1 step", "run, 2 steps", *others],
        "3": others,
    }
    assert all(0 <= row["accuracy"] <= 1 for rows in found.values() for row in rows.values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "run, 1 step" in result.output
    twice = CliRunner().invoke(glyphs.glyphs, [str(tmp_path / "run"), str(tmp_path / "run")])
    assert twice.exit_code == 2
    assert "must have different names" in twice.output


def test_a_rule_of_other_tasks_is_refused(tmp_path: Path) -> None:
    sizes = ["task.width=4", "trainer.steps=1", "trainer.tasks=2", "trainer.validation_tasks=2"]
    start_run(load_config("sinusoid-maml", [*sizes, "trainer.validate_every=1"]), tmp_path / "run").run()
    result = CliRunner().invoke(glyphs.glyphs, [str(tmp_path / "run"), "--without-baselines"])
    assert result.exit_code == 1
    assert "was not trained on glyphs; train it with `lopt train glyphs-maml`" in result.output
