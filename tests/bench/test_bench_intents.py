"""`bench intents`: few-shot classifiers of texts on unseen intents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from utterance_cases import LANGUAGES, write_texts

from bench.quality import intents
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run


def test_starts_and_baselines_are_judged_on_the_same_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROTOTYPE_STEPS", "JOINT_STEPS", "TUNING_STEPS"):
        monkeypatch.setattr(intents, name, 2)
    monkeypatch.setattr("lopt.evaluation.classes.fine_tuning.RATES", (1e-2,))
    sizes = ["task.width=2", "task.buckets=32", "task.ways=3", "task.shots=2", f"task.languages={','.join(LANGUAGES)}"]
    few = ["trainer.steps=2", "trainer.tasks=2", "trainer.validation_tasks=2", "trainer.validate_every=2"]
    data = f"task.data={write_texts(tmp_path / 'data')}"
    start_run(load_config("intents-maml", [*sizes, *few, data]), tmp_path / "run").run()
    out, picture = tmp_path / "found.json", tmp_path / "picture.png"
    given = [str(tmp_path / "run"), "--tasks", "20", "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(intents.intents, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    others = [intents.CENTROIDS, intents.RIDGE, intents.PROTOTYPES, intents.JOINT_PROTOTYPES, intents.JOINT]
    assert list(found["results"]) == ["run", *others]
    assert all(0 <= row["accuracy"] <= 1 for row in found["results"].values())
    first = found["results"][intents.CENTROIDS]
    assert (first["gain"], first["gain_interval"]) == (0, 0)
    assert found["results"]["run"]["gain"] == pytest.approx(found["results"]["run"]["accuracy"] - first["accuracy"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3 of 6 unseen intents" in result.output
    twice = CliRunner().invoke(intents.intents, [str(tmp_path / "run"), str(tmp_path / "run")])
    assert twice.exit_code == 2
    assert "must have different names" in twice.output
