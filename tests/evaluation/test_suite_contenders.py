"""Contenders: all lower the loss, and step whatever tensors the tasks have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from suite_cases import SHORT, TASKS
from torch import nn

from lopt.evaluation.suites import find_task
from lopt.evaluation.suites.contenders import CONTENDERS, prepare, rate
from lopt.evaluation.suites.runs import train_task
from lopt.evaluation.suites.task import SuiteTask
from lopt.evaluation.suites.work import prepare_rule
from lopt.rules import RULES

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


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
