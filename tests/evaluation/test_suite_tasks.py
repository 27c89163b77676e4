"""Suites: tasks are functions of their seed, suites have nothing in common, a run is the loop that a user writes."""

from __future__ import annotations

import math

import pytest
import torch
from pages import ROOT
from suite_cases import SHORT, TASKS, TINY
from torch import nn

from lopt.evaluation.suites import SUITES
from lopt.evaluation.suites.archive import compute_start
from lopt.evaluation.suites.contenders import prepare
from lopt.evaluation.suites.runs import train_task
from lopt.evaluation.suites.task import SuiteTask

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


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


@pytest.mark.slow
@each_task
def test_task_has_its_size_and_is_a_function_of_its_seed(task: SuiteTask) -> None:
    low, high = (1_000_000, 10_000_000) if task in SUITES["large"] else (10_000, 500_000)
    assert low <= compute_start(task).parameters <= high
    assert 300 <= task.num_steps <= 2000
    assert task.start().resembles(task.start())
    check_seeds(task)


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
