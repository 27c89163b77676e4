"""`bench widths`: rules on convnets of several widths, beside tuned SGD and Adam."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.quality import widths
from lopt.evaluation.baselines import Grid


def test_rules_and_tuned_optimizers_are_judged_on_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "GRID", Grid(low=-8, high=-6))
    out, picture = tmp_path / "found.json", tmp_path / "curves.png"
    sizes = ["--width", "1", "--width", "2", "--steps", "3", "--tasks", "2", "--tuning-tasks", "1"]
    given = ["gradient_memory", "linear", *sizes, "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(widths.widths, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    assert [comparison["title"] for comparison in found] == ["width 1", "width 2"]
    labels = ["gradient_memory", "linear", "sgd", "adam", "adam, lr 0.001"]
    assert all([entry["label"] for entry in comparison["entries"]] == labels for comparison in found)
    assert found[0]["parameters"] < found[1]["parameters"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    twice = CliRunner().invoke(widths.widths, ["linear", "linear", *sizes])
    assert twice.exit_code == 2
    assert "must have different names" in twice.output
