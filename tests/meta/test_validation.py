"""Validations are of the tasks that a rule can be judged on, and an untrained rule never comes back in silence."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lopt
from lopt.core.tensors import Params
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.trainer.best import UNTRAINED
from lopt.meta.trainer.checkpoint import RULE
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.trainer.validation import FAILURE, Validator
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, Rule
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.base import Batch, Task
from lopt.tasks.module import ModuleTask

CONFIG: dict[str, Any] = {"tasks": 2, "steps": 4, "validate_every": 2, "validation_tasks": 8, "validation_steps": 10}


class Poisoned(type(TASKS["quadratic"]())):  # type: ignore[misc]
    """Quadratics of which a share, by what they are, has a loss or only a gradient that is not finite."""

    name = "poisoned"

    def __init__(self, poison: str, above: float = 0.0) -> None:
        super().__init__(dim=2)
        self.poison, self.above = poison, above

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task: Task = super().sample(generator, pool)
        return task | {"bad": (task["y"][0] > self.above).float()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        loss: Tensor = super().loss(params, batch)
        nothing = 0 * params["x"].sum()
        # A division by 0 is NaN, and so is the derivative of a root there.
        return loss + (nothing / (1 - batch["bad"]) if self.poison == "loss" else (1 - batch["bad"] + nothing).sqrt())


def make_trainer(family: TaskFamily, rule: Rule | None = None, folder: Path | None = None, **changes: Any) -> Trainer:
    config = TrainerConfig(**(CONFIG | changes))
    return Trainer(rule or RULES["sgd"](lr=0.05), family, ESTIMATORS["truncated"](num_steps=5), config, folder=folder)


def find_bad(family: TaskFamily) -> Tensor:
    from lopt.core.random import derive_seeds
    from lopt.meta.unroll.inner_loop import InnerLoop

    loop = InnerLoop(RULES["sgd"](), family, int(derive_seeds(0, "validation")))
    return loop.start(torch.arange(CONFIG["validation_tasks"])).task["bad"].bool()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_tasks_that_are_not_finite_without_any_step_are_left_out_and_counted(poison: str, tmp_path: Path) -> None:
    family = Poisoned(poison)
    bad = find_bad(family)
    assert 0 < bad.sum() < len(bad)
    trainer = make_trainer(family, folder=tmp_path)
    rule = trainer.run()
    # What a quadratic of two numbers comes to under gradient descent, in float64.
    with torch.no_grad():
        losses = run_curves(rule, family, torch.arange(8), 10, stream="validation", split="outer_valid").losses.double()
    expected = losses[1:, ~bad][-1].mean()
    assert trainer.best.value == pytest.approx(float(expected), rel=1e-6)
    card = lopt.load_card(tmp_path / RULE)["training"]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["left_out"] for line in lines] == [int(bad.sum())] * 3
    assert (card["left_out"], card["diverged"], card["improved"]) == (int(bad.sum()), 0, True)
    assert trainer.best.step > 0


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_family_without_any_finite_task_is_refused_before_a_step_is_made(poison: str) -> None:
    trainer = make_trainer(Poisoned(poison, above=-math.inf))
    with pytest.raises(ValueError, match=r"poisoned: on none of the 8 held-out tasks.*NaN or infinite values in the d"):
        trainer.run()
    assert trainer.step == 0


def test_one_row_whose_loss_overflows_does_not_give_back_the_initial_weights() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    x[7, 1] = 1e25
    splits = {"train": (x, y), "inner_valid": (x, y), "outer_valid": (x, y), "test": (x, y)}
    family = ModuleTask(lambda: nn.Linear(3, 1), F.mse_loss, splits, batch_size=2)
    trainer = make_trainer(family)  # of 20 rows drawn some tasks have it, some have not
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run()
    assert 0 < trainer.best.left_out < 8
    assert trainer.best.step > 0
    with pytest.raises(ValueError, match="module: on none of the 8 held-out tasks"):
        make_trainer(family, validation_steps=400).run()


def test_a_rule_that_fails_on_sound_tasks_is_judged_by_how_many_in_finite_numbers() -> None:
    family = TASKS["quadratic"](dim=2)
    config = TrainerConfig(**CONFIG)
    found = {}
    for lr in (0.01, 0.6, 1.2, 1e30):  # from too large a rate on, the steeper tasks run away
        rule = RULES["sgd"](lr=lr)
        judged = Validator({"quadratic": family}, config, Ranks()).judge(rule).figures
        with torch.no_grad():
            losses = run_curves(rule, family, torch.arange(8), 10, stream="validation", split="outer_valid").losses
            still = run_curves(RULES["sgd"](lr=0.0), family, torch.arange(8), 10, stream="validation").losses
        worst = FAILURE * float(still.double().max())
        bounded = losses[1:].double()
        bounded = torch.where(bounded.isfinite() & (bounded <= worst), bounded, worst)
        assert judged["final"] == pytest.approx(float(bounded[-1].mean()), rel=1e-6)
        assert judged["mean"] == pytest.approx(float(bounded.mean()), rel=1e-6)
        assert judged["diverged"] == int((bounded == worst).any(0).sum())
        assert judged["left_out"] == 0
        assert all(map(math.isfinite, judged.values()))
        found[lr] = judged
    assert found[0.01]["diverged"] == 0
    assert found[1e30]["diverged"] == 8
    ordered = [found[lr]["final"] for lr in sorted(found, key=lambda lr: found[lr]["diverged"])]
    assert ordered == sorted(ordered)


def test_a_run_that_never_improves_says_so_and_its_card_too(tmp_path: Path) -> None:
    trainer = make_trainer(TASKS["quadratic"](dim=2), folder=tmp_path, learning_rate=1e-30)
    with pytest.warns(UserWarning, match="no validation was better than the one before training"):
        trainer.run()
    assert lopt.load_card(tmp_path / RULE)["training"]["improved"] is False
    with pytest.warns(UserWarning, match=UNTRAINED):  # a resume says it again
        trainer.run()


def test_a_rule_that_fails_on_all_tasks_is_an_error_and_no_result() -> None:
    with pytest.raises(ValueError, match=r"diverges on all 8 held-out tasks, with its best weights \(step 0\)"):
        make_trainer(TASKS["quadratic"](dim=2), RULES["sgd"](lr=1e30)).run()


def test_the_error_of_classifiers_may_decide_and_other_families_refuse_it() -> None:
    config = TrainerConfig(**(CONFIG | {"validation_metric": "error"}))
    digits = TASKS["mlp"](width=4, batch_size=16)
    rule = RULES["sgd"](lr=0.3)
    found = Validator({"digits": digits}, config, Ranks()).judge(rule).figures
    accuracy = run_curves(
        rule, digits, torch.arange(8), 10, seed=0, stream="validation", split="outer_valid", pool="outer_valid"
    ).metrics["accuracy"]
    assert found["error"] == pytest.approx(1 - float(accuracy.mean()), abs=1e-6)
    both = Validator({"digits": digits, "wine": TASKS["tabular"]()}, config, Ranks()).judge(rule)
    errors = [own["error"] for own in both.families.values()]
    assert errors[0] != errors[1]
    assert both.figures["error"] == pytest.approx(sum(errors) / 2)
    with pytest.raises(ValueError, match=r"quadratic measures no accuracy: set trainer.validation_metric"):
        make_trainer(TASKS["quadratic"](dim=2), validation_metric="error").run()
