"""`bench families`: rules against Adam on every family of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.quality.families import CONSTANT, DEFAULT_LABEL, SCHEDULED, families, summarize
from bench.quality.field import read_curve
from lopt.evaluation.baselines import Grid, Tuning
from lopt.meta.config.load import parse_config
from lopt.meta.runs.folder import start_run

TINY = {
    "name": "tiny",
    "rule": {"name": "blend"},
    "estimator": {"name": "full_es"},
    "horizon": {"steps": 4},
    "source": [
        {"task": {"name": "quadratic", "dim": {"choose": [2, 3]}}, "buckets": 2},
        {"task": {"name": "rosenbrock"}},
    ],
    "trainer": {"steps": 2, "tasks": 2, "validate_every": 1, "validation_tasks": 2, "validation_steps": 5},
}


def test_every_family_is_compared_and_the_picture_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bench.quality.families.TUNING", Tuning(Grid(ratio=10, low=-5, high=1), num_seeds=2, finalists=1)
    )
    trainer = start_run(parse_config(TINY), tmp_path / "run")
    trainer.run()
    out, picture = tmp_path / "found.json", tmp_path / "field.png"
    given = [str(tmp_path / "run"), "--steps", "5", "--seeds", "2", "--other", "rastrigin"]
    options = ["--archive", str(tmp_path / "archive"), "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(families, [*given, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    labels = {"tiny", "tiny, untrained", DEFAULT_LABEL, CONSTANT, SCHEDULED}
    bowls = ["quadratic 1, 5 steps", "quadratic 2, 5 steps"]
    assert list(found["losses"]) == [*bowls, "rosenbrock, 5 steps", "rastrigin (not trained on), 5 steps"]
    assert all(set(own) == labels for own in found["losses"].values())
    assert all(len(losses) == 2 for own in found["losses"].values() for losses in own.values())
    assert found["summary"]["tiny"]["families"] == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rosenbrock, 5 steps" in result.output


def test_a_rule_that_diverged_does_not_cost_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"tiny": [None], "tiny, untrained": [1.0], DEFAULT_LABEL: [1.0], CONSTANT: [1.0], SCHEDULED: [1.0]}
    monkeypatch.setattr("bench.quality.families.measure", lambda *_: losses)
    start_run(parse_config(TINY), tmp_path / "run").run()
    out = tmp_path / "found.json"
    given = [str(tmp_path / "run"), "--archive", str(tmp_path / "archive"), "--json", str(out)]
    result = CliRunner().invoke(families, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["summary"]["tiny"][f"to {CONSTANT}"] is None


def test_summary_is_made_of_means_and_a_loss_that_is_not_finite_is_the_worst() -> None:
    def losses(rule: list[float | None], tuned: float) -> dict[str, list[float | None]]:
        return {"r": rule, "r, untrained": [8.0], DEFAULT_LABEL: [4.0], CONSTANT: [tuned], SCHEDULED: [1.0]}

    results = {"a": losses([1.0, 3.0], 1.0), "b": losses([None, 1.0], 2.0), "c": losses([0.5], 0.5)}
    found = summarize(results, "r")
    assert found[f"to {CONSTANT}"] == 2.0
    assert found["to r, untrained"] == 0.25
    assert (found["families better than default"], found["families"]) == (2, 3)


def test_curve_is_against_the_time_of_the_outer_steps() -> None:
    lines = [
        {"kind": "validation", "final": 1.0},
        {"kind": "train", "inner_steps": 600.0, "inner_steps_per_second": 10.0},
        {"kind": "source a", "inner_steps": 600.0, "inner_steps_per_second": 10.0},
        {"kind": "validation", "final": None},
        {"kind": "train", "inner_steps": 1200.0, "inner_steps_per_second": 10.0},
        {"kind": "validation", "final": -1.0},
    ]
    assert read_curve(lines) == [(0.0, 1.0), (3.0, -1.0)]


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(families, [str(tmp_path), "--archive", str(tmp_path / "archive")])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path / 'rule.safetensors'} cannot be compared")
    assert len(result.output.splitlines()) == 1
