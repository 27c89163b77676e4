"""Judging: figures are what they say, and `lopt eval --suite` judges, counts and compares."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from suite_cases import SHORT, make_run

import lopt
from lopt.cli.program import cli
from lopt.evaluation.report.suite import load_suite, render_suite, state_verdict
from lopt.evaluation.statistics import average_middle, average_middle_interval
from lopt.evaluation.suites.figures import Measured, list_worst, stand, summarize
from lopt.evaluation.suites.judging import Entrant, judge, open_tuned
from lopt.evaluation.suites.search import (
    tune,
)
from lopt.evaluation.suites.tuning import tune_suite
from lopt.evaluation.suites.work import hide, prepare_rule
from lopt.rules import RULES


def test_interquartile_mean_is_that_of_sorted_logs() -> None:
    ratios = [0.5, 2.0, 1.0, 8.0, 0.25, 4.0, 100.0, 0.01]
    assert average_middle(ratios) == pytest.approx(np.exp(np.log([0.5, 1.0, 2.0, 4.0]).mean()))
    mean, low, high = average_middle_interval(ratios)
    assert low < mean < high
    assert average_middle([1.0, 1.0, 1.0, math.inf]) == 1.0


def test_ratios_are_of_geometric_means_over_seeds() -> None:
    ours = [make_run(train=1.0), make_run(train=4.0)]
    theirs = [make_run(train=4.0), make_run(train=16.0)]
    standing = stand(Measured("short", ours, theirs, theirs))
    assert standing.train == pytest.approx(2.0)
    assert standing.train_ratio == pytest.approx(0.25)
    assert standing.beats_default


def test_diverged_run_makes_its_task_the_worst() -> None:
    fine, lost = [make_run(train=2.0)], [make_run(train=None)]
    reference = [make_run(train=1.0)]
    row = summarize("x", "rule", [Measured("a", fine, reference), Measured("b", lost, reference)])
    assert (row.worse, row.diverged) == (2, 1)
    assert [standing.task for standing in list_worst(row)] == ["b", "a"]


def test_rule_is_judged_on_a_suite_and_counted_on_its_card(tiny_suites: None, tmp_path: Path) -> None:
    tune_suite("development", folder=tmp_path / "tuned", num_seeds=2)
    tune_suite("heldout", folder=tmp_path / "tuned", num_seeds=2)
    path = lopt.save(RULES["adam"](), tmp_path / "mine.safetensors", {"name": "mine"})
    out = tmp_path / "judged"
    arguments = ["eval", str(path), "--suite", "heldout", "--seeds", "2", "--workers", "1", "--out", str(out)]
    arguments += ["--archive", str(tmp_path / "tuned")]
    outcome = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "On 2 heldout tasks, 2 seeds, mine ends at" in outcome.output.replace("\n", " ")
    result = load_suite(out / "suite.json")
    assert [standing.task for standing in result.rule.standings] == ["tiny", "short"]
    assert {row.kind for row in result.rows} == {"rule", "tuned", "one rate", "default"}
    assert result.untuned == []
    partly = state_verdict(replace(result, untuned=["short"]))
    assert partly.startswith("On the 1 with a tuned Adam of 2 heldout tasks, 2 seeds, mine ends at")
    assert lopt.load_card(path)["heldout_runs"] == result.heldout_runs == 1
    page = (out / "suite.html").read_text()
    assert "mine on the heldout suite" in page
    assert "<p><b>mine</b> is a rule of kind &#39;adam&#39;: 5 learned numbers that read gradients" in page
    assert f'<pre>optimizer = lopt.LearnedOptimizer(model.parameters(), rule="{path}")</pre>' in page
    assert "LearnedOptimizer" not in render_suite(replace(result, source=""))  # nobody knows where it lies
    assert (out / "profile.png").stat().st_size > 1000
    # The runs are kept; another look costs none, and counts again.
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    outcome = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "all runs are those that were kept" in outcome.output
    assert before == {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    assert lopt.load_card(path)["heldout_runs"] == 2


def test_adam_as_a_rule_stands_where_adam_does(tiny_suites: None, tmp_path: Path) -> None:
    tune_suite("development", folder=tmp_path, num_seeds=1)
    choice = tune(open_tuned("development", tmp_path), SHORT, "adam")
    assert choice is not None
    rule = RULES["adam"](lr=choice.lr)
    result = judge(
        [Entrant("mine", rule)], "development", out=tmp_path / "out", tasks=["short"], num_seeds=1, tuned=tmp_path
    )
    assert result is not None
    adam = next(row for row in result.rows if (row.label, row.kind) == ("Adam", "tuned"))
    assert result.rule.standings[0].train == pytest.approx(adam.standings[0].train, rel=1e-4)


def test_rule_may_be_judged_without_loss_and_length(tiny_suites: None, tmp_path: Path) -> None:
    group = prepare_rule(RULES["adam"](), 2.0, hide(["num_steps"]))(SHORT.model(0), 12).optimizer.param_groups[0]
    assert (group["num_steps"], group["lr"]) == (None, 2.0)
    group = prepare_rule(RULES["adam"]())(SHORT.model(0), 12).optimizer.param_groups[0]
    assert (group["num_steps"], group["lr"]) == (12, 1.0)
    rule, losses = RULES["velo"](), []
    for hidden in ("", hide(["loss"])):
        training = prepare_rule(rule, hidden=hidden)(SHORT.model(0), 12)
        training.optimizer.step = lambda loss=None: losses.append(loss)  # type: ignore[method-assign]
        training.step(torch.tensor(3.0))
    assert losses == [3.0, None]
    entrant = Entrant("mine", RULES["adam"](), ("loss",), 2.0)
    result = judge([entrant], "development", out=tmp_path, tasks=["short"], num_seeds=1, tuned=tmp_path)
    assert result is not None
    assert result.rule.label == "mine, without loss, lr 2"


@pytest.mark.parametrize(
    ("hidden", "known", "plan"),
    [
        ([], 0, (12, None)),
        (["num_steps"], 9, (12, (9, 3))),
        (["loss", "num_steps"], 9, (12, (9, 3))),
        (["end"], None, (None, None)),
        (["end", "num_steps"], None, (None, None)),
    ],
)
def test_rule_that_is_not_told_the_length_is_cooled_down_unless_the_end_is_hidden_too(
    hidden: list[str], known: int | None, plan: tuple[object, object]
) -> None:
    model = SHORT.model(0)
    training = prepare_rule(RULES["base"](), hidden=hide(hidden))(model, 12)
    (group,), ends = training.optimizer.param_groups, []
    for step in range(12):
        SHORT.loss(model, SHORT.batch(0, step)).backward()
        training.step(torch.tensor(1.0))
        ends.append(group["num_steps"])
    assert (group["num_steps"], group["cool_down"]) == plan
    assert [step for step, end in enumerate(ends) if end is not None] == list(range(12 if known is None else known, 12))


def test_another_rule_is_compared_task_by_task(tiny_suites: None, tmp_path: Path) -> None:
    rates = {"mine": 1e-2, "slow": 1e-4, "same": 1e-2}
    entrants = [Entrant(name, RULES["adam"](lr=lr)) for name, lr in rates.items()]
    result = judge(entrants, "development", out=tmp_path, tuned=tmp_path)
    assert result is not None
    mine, slow, same, _ = result.rows
    assert [row.kind for row in result.rows] == ["rule", "other", "other", "default"]
    assert same.against is not None
    assert slow.against is not None
    assert (same.against.value, same.against.high) == (1.0, 1.0)
    ratios = [a.train / b.train for a, b in zip(mine.standings, slow.standings, strict=True) if a.train and b.train]
    assert slow.against.value == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


def test_untuned_tasks_are_said_to_be_so(tiny_suites: None, tmp_path: Path) -> None:
    result = judge(
        [Entrant("mine", RULES["adam"]())],
        "development",
        out=tmp_path / "out",
        tasks=["short"],
        num_seeds=1,
        tuned=tmp_path,
    )
    assert result is not None
    assert result.untuned == ["short"]
    assert result.rule.train is None
    json.dumps(result.to_json(), allow_nan=False)


def test_options_of_other_evaluations_are_refused_with_a_suite() -> None:
    outcome = CliRunner().invoke(cli, ["eval", "digits-lstm", "--suite", "development", "--steps", "5"])
    assert outcome.exit_code == 2
    assert "its own tasks" in outcome.output
    outcome = CliRunner().invoke(cli, ["eval", "digits-lstm", "--tasks", "short"])
    assert outcome.exit_code == 2


@pytest.mark.slow
def test_processes_of_torchrun_share_the_runs_of_a_suite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lopt", "eval", "adam"]
    command += [
        "--suite",
        "development",
        "--tasks",
        "cancer_table,tiny_batches",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cancer_table.json", "tiny_batches.json"]
    (standing, _) = load_suite(tmp_path / "suite.json").rule.standings
    assert standing.task == "tiny_batches"


@pytest.mark.slow
def test_workers_do_what_one_process_does(tmp_path: Path) -> None:
    results = [
        judge(
            [Entrant("adam", RULES["adam"]())], "development", out=tmp_path / str(n), tasks=["cancer_table"], workers=n
        )
        for n in (1, 2)
    ]
    (one, *_), (two, *_) = (result.rule.standings for result in results if result is not None)
    assert (one.train, one.validation) == (two.train, two.validation)
