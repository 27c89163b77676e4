"""`torch.set_default_dtype` changes nothing: what is computed under it is, bit for bit, what float32 gives.

Caches that hold tensors are filled in whichever order tests run: they must not remember a dtype either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_cases import is_same
from estimator_cases import constant
from rule_cases import make_quick
from task_cases import FAMILIES, build, draw_tasks
from torch import Tensor, nn
from training_cases import fit_init, hash_state, make_config

import lopt
from lopt.core.random import make_generator
from lopt.evaluation.suites import find_task
from lopt.evaluation.suites.runs import train_task
from lopt.evaluation.suites.work import prepare_rule
from lopt.meta.config.load import parse_config
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.runs.folder import start_run
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, files
from lopt.tasks import TASKS

ROOT = Path(lopt.__file__).parents[1]
OTHERS = [torch.float64, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))]

every_other = pytest.mark.parametrize("dtype", OTHERS, ids=str)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def draw(i: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=make_generator(i), dtype=torch.float32)


# -- rules and the optimizer -----------------------------------------------------------------------


def use(name: str, folder: Path, guard: bool) -> Any:
    """All there is of a rule that is made, saved, loaded, stepped under a scheduler, and resumed."""
    rule = make_quick(name)
    files.save(rule, folder / f"{name}.safetensors", {})
    rule = lopt.load(folder / f"{name}.safetensors")
    shapes = ((4, 3), (5,), (5,), ())
    params = [nn.Parameter(draw(i, *shape)) for i, shape in enumerate(shapes)]
    groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 0.5}, {"params": params[3:], "rule": "adamw"}]
    optimizer = lopt.LearnedOptimizer(groups, rule, lr=2.0, weight_decay=0.1, num_steps=9, guard=guard)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for step in range(6):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = lopt.LearnedOptimizer(groups, rule, lr=2.0, num_steps=9, guard=guard)
            optimizer.load_state_dict(saved)
            scheduler.optimizer = optimizer
        for i, p in enumerate(params):
            p.grad = draw(10 * step + i, *p.shape)
        optimizer.step(loss=3.0 - 0.5 * step)
        scheduler.step()
    return dict(rule.state_dict()), optimizer.state_dict()["state"], params


@every_other
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize("name", RULES)
def test_rule_is_made_saved_loaded_and_stepped_alike(
    name: str, guard: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    expected = use(name, tmp_path, guard)
    with default_dtype(dtype):
        assert is_same(use(name, tmp_path, guard), expected)


# -- meta-training ---------------------------------------------------------------------------------


def visit(name: str) -> Any:
    """Tasks, weights, a batch, losses and gradients."""
    family = build(FAMILIES[name])
    tasks, params, batch = draw_tasks(family, 2)
    leaves = {key: p.requires_grad_() for key, p in params.items()}
    losses = family.losses(leaves, batch)
    return tasks, params, batch, losses, list(torch.autograd.grad(losses.sum(), list(leaves.values())))


@every_other
@pytest.mark.parametrize("name", FAMILIES)
def test_task_is_drawn_and_computed_alike(name: str, dtype: torch.dtype) -> None:
    expected = visit(name)
    with default_dtype(dtype):
        assert is_same(visit(name), expected)


def train(folder: Path, estimator: str, rule: str, **task: Any) -> str:
    raw = make_config(steps=3, validate_every=2, checkpoint_every=3).to_dict()
    options = {"name": estimator, "num_steps": 3, **ESTIMATORS[estimator].quick_config}
    rule_options = {"name": rule, **RULES[rule].quick_config}
    start_run(parse_config(fit_init(raw | {"estimator": options, "rule": rule_options} | task)), folder).run()
    return hash_state(folder)


@every_other
@pytest.mark.parametrize("name", ESTIMATORS)
def test_meta_training_is_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = train(tmp_path / "a", name, "linear")
    with default_dtype(dtype):
        assert train(tmp_path / "b", name, "linear") == expected


@every_other
@pytest.mark.parametrize("name", RULES)
def test_meta_gradient_of_a_rule_is_the_same(name: str, dtype: torch.dtype) -> None:
    def estimate() -> Any:
        rule, estimator = make_quick(name), ESTIMATORS["truncated"](num_steps=3)
        loop = InnerLoop(rule, TASKS["mlp"](width=3, batch_size=4), 0, constant(6))
        found = estimator.estimate(loop, estimator.start(loop, torch.arange(2)))
        return dict(found.gradient), found.metrics

    expected = estimate()
    with default_dtype(dtype):
        assert is_same(estimate(), expected)


# -- suites ----------------------------------------------------------------------------------------


@every_other
def test_run_of_a_suites_program_is_the_same(dtype: torch.dtype) -> None:
    task = replace(find_task("tiny_batches"), num_steps=8)

    def train_it() -> Any:
        run = train_task(task, 1, prepare_rule(RULES["base"]()), label="rule")
        return run.train, run.validation, run.curve, task.start()

    expected = train_it()
    with default_dtype(dtype):
        assert train_it() == expected


# -- the source ------------------------------------------------------------------------------------

FACTORIES = ("tensor", "full", "zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye")


@pytest.mark.parametrize("folder", ["lopt", "kernels", "bench"])
def test_tensors_are_made_with_a_dtype(folder: str) -> None:
    """But for the programs of suites, which are written as users write theirs."""
    bare = []
    for file in sorted(set((ROOT / folder).rglob("*.py")) - set((ROOT / "lopt/evaluation/suites").rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            makes = isinstance(node, ast.Call) and ast.unparse(node.func) in [f"torch.{name}" for name in FACTORIES]
            if makes and not any(keyword.arg == "dtype" for keyword in node.keywords):
                bare.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not bare
