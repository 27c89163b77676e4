"""Suites: tasks are functions of their seed, searches find and extend, archives resume, figures are what they say."""

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
from pages import ROOT
from torch import nn

import lopt
from bench.__main__ import cli as bench_cli
from lopt.cli.program import cli
from lopt.evaluation.report.suite import load_suite, state_verdict
from lopt.evaluation.statistics import average_middle, average_middle_interval
from lopt.evaluation.suites import SUITES, find_task, perceptrons
from lopt.evaluation.suites.archive import TUNED, Archive, compute_start
from lopt.evaluation.suites.contenders import CONTENDERS, Recipe, prepare, rate
from lopt.evaluation.suites.figures import Measured, list_worst, stand, summarize
from lopt.evaluation.suites.judging import Entrant, judge, open_tuned
from lopt.evaluation.suites.runs import Run, train_task
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
from lopt.evaluation.suites.task import SuiteTask
from lopt.evaluation.suites.tuning import tune_suite
from lopt.evaluation.suites.work import Share, hide, prepare_rule
from lopt.rules import RULES

TINY = replace(perceptrons.TINY_BATCHES, name="tiny", num_steps=10)
SHORT = replace(perceptrons.DEEP_MLP, name="short", num_steps=12, build=lambda: nn.Linear(16, 2))


@pytest.fixture
def tiny_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of some steps in the place of all, and two contenders with two learning rates."""
    for name in SUITES:
        monkeypatch.setitem(SUITES, name, [TINY, SHORT])
    for name in list(CONTENDERS):
        if name not in ("adam", "adamw"):
            monkeypatch.delitem(CONTENDERS, name)
    for name in ("adam", "adamw"):
        monkeypatch.setitem(CONTENDERS, name, replace(CONTENDERS[name], low=-4, high=-3, schedules=("constant",)))


def make_run(
    label: str = "adam", lr: float = 0.01, seed: int = 0, train: float | None = 1.0, schedule: str = "constant"
) -> Run:
    return Run(label, schedule, lr, seed, train, train, None, train is None, 1.0, 1.0, [4.0, 2.0, train])


# -- tasks -------------------------------------------------------------------------------------------------------------


def check_seeds(task: SuiteTask) -> None:
    """Weights, batches and validation are functions of the seed, and touch no global generator."""
    task.load()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = task.model(1), task.model(1), task.model(2)
    batch, same, next_batch = task.batch(1, 3), task.batch(1, 3), task.batch(1, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))
    assert all(map(torch.equal, batch, same))
    assert not all(map(torch.equal, batch, next_batch))
    assert task.validate(first) == task.validate(again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("task", [TINY, SHORT], ids=lambda task: task.name)
def test_task_is_a_function_of_its_seed(task: SuiteTask) -> None:
    check_seeds(task)


def test_an_epoch_has_every_example_once() -> None:
    x = torch.cat([TINY.batch(0, step)[0] for step in range(1437 // 4)])
    train = TINY.load().train[0]
    assert len(x.unique(dim=0)) == len(train.unique(dim=0)) - 1  # 1,437 is odd: one is left out


def test_run_is_the_loop_that_a_user_writes() -> None:
    run = train_task(SHORT, 3, prepare("adamw", "cosine", 0.01), label="adamw")
    model = SHORT.model(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + math.cos(math.pi * step / 12))
        x, y = SHORT.batch(3, step)
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert run.train == pytest.approx(losses[-1], rel=1e-5)
    assert run.curve == pytest.approx(losses, rel=1e-3)
    x, y = SHORT.load().held_out
    assert run.validation == pytest.approx(((model(x) - y) ** 2).mean().item(), rel=1e-5)
    assert not run.diverged


def test_run_that_diverges_ends_early_and_says_so() -> None:
    run = train_task(SHORT, 0, prepare("nesterov", "constant", 1e30), label="nesterov")
    assert run.diverged
    assert run.train is None
    assert run.validation is None
    assert run.curve[-1] is None


def test_validation_leaves_mode_buffers_and_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = TINY.validate(model), TINY.validate(model)
    assert first == second
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- contenders --------------------------------------------------------------------------------------------------------


def test_muon_orthogonalises_matrices_and_leaves_embeddings_and_vectors_to_adamw() -> None:
    pytest.importorskip("pytorch_optimizer")
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 3), nn.Conv1d(2, 3, 2)])
    groups = CONTENDERS["muon"].recipe.make(model, 0.01, 10).param_groups
    shapes = {group["use_muon"]: [tuple(p.shape) for p in group["params"]] for group in groups}
    assert shapes == {True: [(3, 4), (3, 2, 2)], False: [(5, 4), (3,), (3,)]}


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_lowers_the_loss(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    lr = 1.0 if CONTENDERS[name].low is None else rate(CONTENDERS[name].high)
    task = replace(SHORT, num_steps=60 if name != "prodigy" else 300)
    run = train_task(task, 0, prepare(name, CONTENDERS[name].schedules[-1], lr), label=name)
    assert run.train is not None
    assert run.curve[0] is not None
    assert run.train < 0.95 * run.curve[0]


# -- search ------------------------------------------------------------------------------------------------------------


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


# -- archive and tuning ------------------------------------------------------------------------------------------------


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


# -- figures -----------------------------------------------------------------------------------------------------------


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


# -- the command -------------------------------------------------------------------------------------------------------


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
    assert "mine on the heldout suite" in (out / "suite.html").read_text()
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


# -- the registry ------------------------------------------------------------------------------------------------------

TASKS = [task for suite in SUITES.values() for task in suite]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_suites_have_no_name_data_or_architecture_in_common() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    development, heldout = SUITES["development"], SUITES["heldout"]
    assert not {t.data_set for t in development} & {t.data_set for t in heldout}
    assert not {t.architecture for t in development} & {t.architecture for t in heldout}
    assert not {t.architecture for t in SUITES["large"]} & {t.architecture for t in development}


def test_page_of_the_suites_lists_every_task() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs" / "suites.md").read_text().splitlines()]
    listed = {
        row[0].strip("| `"): (row[1], row[2], row[4]) for row in rows if row[0].startswith("| `") and len(row) > 4
    }
    assert listed == {task.name: (task.title, task.data_set, f"{task.num_steps:,}") for task in TASKS}


def check_optimizers_step(task: SuiteTask) -> None:
    short = replace(task, num_steps=12)
    builds = {name: prepare(name, c.schedules[-1], rate(c.low or 0)) for name, c in CONTENDERS.items()}
    for name, build in (builds | {"rule": prepare_rule(RULES["blend"]())}).items():
        run = train_task(short, 0, build, label=name)
        assert run.train is not None, name
        assert run.validation is not None, name


@pytest.mark.parametrize("name", ["digits_conv"])
def test_all_optimizers_step_the_tensors_of_a_task(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    check_optimizers_step(find_task(name))


@pytest.mark.slow
@each_task
def test_all_optimizers_step_the_tensors_of_every_task(task: SuiteTask) -> None:
    check_optimizers_step(task)


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
def test_workers_do_what_one_process_does(tmp_path: Path) -> None:
    results = [
        judge(
            [Entrant("adam", RULES["adam"]())], "development", out=tmp_path / str(n), tasks=["cancer_table"], workers=n
        )
        for n in (1, 2)
    ]
    (one, *_), (two, *_) = (result.rule.standings for result in results if result is not None)
    assert (one.train, one.validation) == (two.train, two.validation)


@pytest.mark.slow
@each_task
def test_task_has_its_size_and_is_a_function_of_its_seed(task: SuiteTask) -> None:
    low, high = (1_000_000, 10_000_000) if task in SUITES["large"] else (10_000, 500_000)
    assert low <= compute_start(task).parameters <= high
    assert 300 <= task.num_steps <= 2000
    assert task.start().resembles(task.start())
    check_seeds(task)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TUNED.glob("*/*.json")), ids=lambda path: path.stem)
def test_archived_runs_are_of_the_tasks_as_they_are(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = find_task(path.stem)
    assert task in SUITES[path.parent.name]
    assert Archive(path.parent).list_runs(task)
    assert caplog.text == ""


@pytest.mark.slow
@each_task
def test_adamw_trains_every_task_in_time(task: SuiteTask) -> None:
    run = train_task(task, 0, prepare("adamw", "constant", 1e-3), label="adamw")
    start = compute_start(task)
    assert run.train is not None
    assert run.validation is not None
    assert run.train < 0.95 * start.loss
    assert not run.diverged
    if task not in SUITES["large"]:
        assert run.seconds < 0.03 * task.num_steps  # 2 CPU-seconds for 100 steps, and half of it for a busy machine
