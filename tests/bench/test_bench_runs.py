"""`python -m bench soak` and `scaling`: whole runs of the trainer, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.program import cli
from bench.speed import scaling
from bench.speed.soak import compare_ends


def test_soak_looks_at_speed_and_memory_as_often_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    options = ["--estimator", "pes", "--rule", "linear", "--tasks", "1", "--steps", "1", "--outer-steps", "20"]
    result = CliRunner().invoke(cli, ["soak", *options, "--points", "4", "--json", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    assert [row["step"] for row in found["rows"]] == [5, 10, 15, 20]
    assert all(row["per_cpu_second"] > 0 and row["resident_mb"] > 50 for row in found["rows"])
    assert found["change"].keys() == {"per_cpu_second", "resident_mb"}
    assert "outer step     20" in result.output


def test_outer_steps_of_a_preset_are_timed_with_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "outer.json"
    overrides = ["--set", "task.width=3", "--set", "trainer.tasks=2"]
    options = ["--steps", "1", "--repeats", "3", "--json", str(file)]
    result = CliRunner().invoke(cli, ["outer", "sinusoid-maml", *overrides, *options], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    low, median, high = (found["results"][f"per_cpu_second{end}"] for end in ("_low", "", "_high"))
    assert 0 < low <= median <= high
    assert found["setting"]["overrides"] == ["task.width=3", "trainer.tasks=2"]
    assert f"sinusoid-maml: {median:.0f} outer steps per CPU-second" in result.output


def test_growth_is_that_of_the_last_quarter_over_the_second() -> None:
    rows = [
        {"per_cpu_second": 100.0, "resident_mb": mb} for mb in (10.0, 90.0, 200.0, 200.0, 300.0, 300.0, 400.0, 600.0)
    ]
    assert compare_ends(rows) == {"per_cpu_second": 1.0, "resident_mb": 500 / 200}


def test_ratios_of_processes_are_paired_by_outer_step() -> None:
    found = scaling.summarize({1: [10.0, 20.0, 40.0], 2: [18.0, 36.0, 72.0]})
    assert found[1]["ratio"] == 1
    assert [found[2][f"ratio{which}"] for which in ("_low", "", "_high", "_of_medians")] == pytest.approx([1.8] * 4)
    assert found[2]["per_second"] == 36


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo")
def test_scaling_measures_runs_of_each_number_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    options = ["--steps", "2", "--rounds", "1", "--set", "trainer.tasks=3", "--json", str(file)]
    result = CliRunner().invoke(cli, ["scaling", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())["results"]
    assert found.keys() == {"1", "2"}
    assert all(own["per_second"] > 0 for own in found.values())
    refused = CliRunner().invoke(cli, ["scaling", "--processes", "2", "--set", "trainer.tasks=1"])
    assert refused.exit_code == 1
    assert "2 processes: lopt: error: 2 processes cannot share 1 tasks" in refused.output
