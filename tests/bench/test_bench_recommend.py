"""`bench recommend`: guesses of new users' stars."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from movielens_cases import write_movielens

from bench.quality.recommend import recommend
from lopt.evaluation.recommend.factorization import MEAN, OFFSET, RIDGE, WHOLE
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run


def test_starts_and_baselines_are_judged_on_the_same_users(tmp_path: Path) -> None:
    data = write_movielens(tmp_path / "data")
    sizes = ["task.factors=2", "trainer.steps=2", "trainer.tasks=2", "trainer.validation_tasks=2"]
    config = load_config("recommend-anil", [*sizes, f"task.data={data}", "task.shots=4", "trainer.validate_every=2"])
    start_run(config, tmp_path / "run").run()
    out, picture = tmp_path / "found.json", tmp_path / "guesses.png"
    given = [str(tmp_path / "run"), "--shots", "3", "--data", data, "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(recommend, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    baselines = [MEAN, OFFSET, RIDGE, WHOLE]
    assert {shots: list(rows) for shots, rows in found.items()} == {"3": baselines, "4": [*baselines, "run"]}
    assert found["4"][RIDGE][RIDGE]["value"] == 1
    assert found["4"]["run"][RIDGE]["low"] < found["4"]["run"][RIDGE]["high"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "12 new users" in result.output
    without = CliRunner().invoke(recommend, ["--shots", "3", "--data", data, "--picture", str(picture)])
    assert without.exit_code == 2
    assert "name one in RUNS" in without.output
