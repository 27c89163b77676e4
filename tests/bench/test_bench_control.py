"""`bench control`: a learned start on held-out bodies, beside tuned learning from scratch and from a joint start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.quality import control
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run


def test_a_run_is_judged_beside_two_kinds_of_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "GRID", (0.1, 0.3))
    sizes = ["task.length=3", "task.pairs=2", "trainer.tasks=2", "trainer.steps=2", "trainer.validation_tasks=1"]
    start_run(load_config("control-arm", [*sizes, "trainer.validate_every=1"]), tmp_path / "run").run()
    out, picture = tmp_path / "found.json", tmp_path / "control.png"
    few = ["--bodies", "3", "--steps", "4", "--tuning-tasks", "2", "--joint-steps", "2"]
    given = [str(tmp_path / "run"), *few, "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(control.control, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    scratch = "random start"
    assert list(found["results"]) == [
        "run",
        scratch,
        f"{scratch}, tuned for 3 steps",
        "joint start",
        "joint start, tuned for 3 steps",
    ]
    for label, cells in found["results"].items():
        assert list(cells) == ["0", "3", "4"]
        assert len(found["curves"][label]) == 5
        for n, cell in cells.items():
            assert cell["return"] == pytest.approx(found["curves"][label][int(n)])
            reference = found["results"][scratch]["4"]["return"]
            assert cell["difference"] == pytest.approx(cell["return"] - reference, abs=1e-9)
            joint = found["results"]["joint start, tuned for 3 steps"][n]["return"]
            assert cell["over_joint"] == pytest.approx(cell["return"] - joint, abs=1e-9)
    assert found["results"][scratch]["4"]["difference_interval"] == 0
    assert all(text.startswith(("sgd, lr", "adam, lr")) for text in found["tuned"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(control.control, [str(tmp_path / "run"), "--steps", "3"])
    assert refused.exit_code == 2
    assert "--steps must be above the 3 steps" in refused.output
