"""Tuning: searches find and extend, archives resume and share, and say what is no longer of use."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from pages import ROOT
from suite_cases import SHORT, TINY, make_run
from torch import nn

from bench.program import cli as bench_cli
from lopt.evaluation.suites import SUITES, find_task
from lopt.evaluation.suites.archive import TUNED, Archive
from lopt.evaluation.suites.contenders import CONTENDERS, Recipe, rate
from lopt.evaluation.suites.judging import open_tuned
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.search import (
    TUNING_SEEDS,
    Request,
    choose_common,
    find_reference,
    plan_judged,
    plan_search,
    plan_tuning,
    tune,
)
from lopt.evaluation.suites.tuning import tune_suite
from lopt.evaluation.suites.work import Share


def finish_search(archive: Archive, losses: dict[int, float | None]) -> list[float]:
    """Answer the search of Adam from a table of losses by exponent, until nothing is missing."""
    asked = []
    while missing := plan_search(archive, SHORT, "adam", "constant"):
        for request in missing:
            asked.append(request.lr)
            exponent = round(2 * math.log10(request.lr))
            archive.add(SHORT, make_run(lr=request.lr, seed=request.seed, train=losses.get(exponent, 9.0)))
    return asked


def test_search_goes_on_beyond_an_edge_until_the_best_is_inside(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    asked = finish_search(archive, {-3: 5.0, -2: 4.0, -1: 3.0, 0: None})
    assert asked.count(1.0) == 1  # tried, and diverged
    best = tune(archive, replace(SHORT), "adam")
    assert best is None  # cosine is still to be searched
    assert plan_search(archive, SHORT, "adam", "constant") == []


def test_search_goes_down_where_everything_diverges(tmp_path: Path) -> None:
    asked = finish_search(Archive(tmp_path), dict.fromkeys(range(-12, 1)) | {-13: 1.0, -14: 2.0})
    assert rate(-13) in asked
    assert rate(-15) not in asked


def test_finalists_are_decided_by_all_tuning_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENDERS, "adam", replace(CONTENDERS["adam"], low=-6, high=-4, schedules=("constant",)))
    archive = Archive(tmp_path)
    first, second = TUNING_SEEDS
    for exponent, seed, loss in [(-6, first, 3.0), (-5, first, 1.0), (-4, first, 1.1), (-5, second, 2.0)]:
        archive.add(SHORT, make_run(lr=rate(exponent), seed=seed, train=loss))
    (missing,) = plan_search(archive, SHORT, "adam", "constant")
    assert (missing.lr, missing.seed) == (rate(-4), second)
    archive.add(SHORT, make_run(lr=rate(-4), seed=second, train=1.1))
    choice = tune(archive, SHORT, "adam")
    assert choice is not None
    assert (choice.lr, choice.loss) == (rate(-4), pytest.approx(1.1))  # 1.1 against sqrt(1 * 2)


def test_tuning_that_is_stopped_goes_on_without_repeating_a_run(tiny_suites: None, tmp_path: Path) -> None:
    done: list[Request] = []

    def stop(request: Request, run: Run, missing: int) -> None:
        done.append(request)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_suite("development", folder=tmp_path, num_seeds=1, on_run=stop)
    tune_suite("development", folder=tmp_path, num_seeds=1, on_run=lambda request, *_: done.append(request))
    assert len(done) == len(set(done)) > 5
    again: list[Request] = []
    tune_suite("development", folder=tmp_path, num_seeds=1, on_run=lambda request, *_: again.append(request))
    assert again == []


def test_bench_tunes_into_an_archive(tiny_suites: None, tmp_path: Path) -> None:
    arguments = ["suite", "large", "--tasks", "short", "--contenders", "adam", "--seeds", "1", "--workers", "1"]
    outcome = CliRunner().invoke(bench_cli, [*arguments, "--archive", str(tmp_path)], catch_exceptions=False)
    assert outcome.exit_code == 0
    archive = open_tuned("large", tmp_path)
    choice = tune(archive, SHORT, "adam")
    assert choice is not None
    assert archive.find(SHORT, *choice[:3], seed=0) is not None
    assert archive.find(SHORT, "adamw", "constant", 1e-3, seed=0) is not None
    assert json.loads((tmp_path / "large" / "short.json").read_text())["command"].startswith("python -m bench")


def test_archived_runs_of_a_task_that_has_changed_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Archive(tmp_path).add(SHORT, make_run())
    assert len(Archive(tmp_path).list_runs(SHORT)) == 1
    changed = replace(SHORT, build=lambda: nn.Sequential(nn.Linear(16, 2), nn.Tanh()))
    assert Archive(tmp_path).list_runs(changed) == []
    assert "another version of short" in caplog.text


def test_archived_runs_of_an_optimizer_that_has_changed_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(tmp_path)
    for label in ("adam", "adamw", "rule 1"):
        archive.add(SHORT, make_run(label))
    changed = replace(CONTENDERS["adam"], recipe=Recipe("Adam", library=False, options={"amsgrad": True}))
    monkeypatch.setitem(CONTENDERS, "adam", changed)
    assert [run.label for run in Archive(tmp_path).list_runs(SHORT)] == ["adamw", "rule 1"]
    assert "optimizers as they were" in caplog.text


def test_archive_that_is_damaged_is_named(tmp_path: Path) -> None:
    Archive(tmp_path).add(SHORT, make_run())
    path = tmp_path / "short.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"short\.json is no archive of runs"):
        Archive(tmp_path).list_runs(SHORT)


def test_ranks_share_all_runs_and_parts_become_one_file(tiny_suites: None, tmp_path: Path) -> None:
    requests = [Request(t, "adam", "constant", lr, s) for t in "ab" for lr in (0.1, 0.2, 0.3) for s in range(4)]
    owners = [[Share(rank, 3).is_mine(request) for rank in range(3)] for request in requests]
    assert all(sum(owner) == 1 for owner in owners)
    for rank in range(2):
        Archive(tmp_path, part=Share(rank, 2).part).add(SHORT, make_run(seed=rank))
    whole = Archive(tmp_path)
    whole.merge(SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["short.json"]
    assert {run.seed for run in Archive(tmp_path).list_runs(SHORT)} == {0, 1}


def test_one_rate_for_all_tasks_is_the_best_over_tasks(tiny_suites: None, tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    losses = {("adam", -4): (1.0, 4.0), ("adam", -3): (1.5, 1.5), ("adamw", -4): (9.0, 9.0), ("adamw", -3): (8.0, 9.0)}
    for task, place in ((TINY, 0), (SHORT, 1)):
        for (label, exponent), loss in losses.items():
            for seed in TUNING_SEEDS:
                archive.add(task, make_run(label, rate(exponent), seed, loss[place]))
        for label in ("adam", "adamw"):  # beyond the edges, so that the searches end
            for exponent in (-5, -2):
                archive.add(task, make_run(label, rate(exponent), TUNING_SEEDS[0], 99.0))
    common = choose_common(archive, [TINY, SHORT], "adam")
    assert common is not None
    assert common.lr == rate(-3)  # sqrt(1.5 * 1) against sqrt(1 * 2.67) of the best of each task
    reference = find_reference(archive, TINY)
    assert reference is not None
    assert (reference.label, reference.lr) == ("adam", rate(-4))


@pytest.mark.slow
def test_processes_of_torchrun_share_a_tuning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bench", "suite"]
    command += ["development", "--tasks", "cancer_table", "--contenders", "adam,adamw", "--archive", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    archive, task = open_tuned("development", tmp_path), find_task("cancer_table")
    assert plan_tuning(archive, [task], ["adam", "adamw"]) == []
    assert plan_judged(archive, [task], ["adam", "adamw"], {}, 3) == []
    keys = [(run.label, run.schedule, run.lr, run.seed) for run in archive.list_runs(task)]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TUNED.glob("*/*.json")), ids=lambda path: path.stem)
def test_archived_runs_are_of_the_tasks_as_they_are(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = find_task(path.stem)
    assert task in SUITES[path.parent.name]
    assert Archive(path.parent).list_runs(task)
    assert caplog.text == ""
