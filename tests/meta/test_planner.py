"""Plans keep what they promise: the measured peak stays near the budget, and the gradient is the same."""

from __future__ import annotations

import pytest
import torch
from estimator_cases import constant, flatten

from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.trainer.memory_plan import PeakMemory, plan_memory
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS

TASKS_AT_ONCE = 8


def make_loop() -> InnerLoop:
    return InnerLoop(RULES["lstm"](), TASKS["quadratic"](dim=32), 0, constant(10))


def measure_peak(loop: InnerLoop, **options: object) -> tuple[int, torch.Tensor]:
    estimator = ESTIMATORS["truncated"](num_steps=10, **options)
    carry = estimator.start(loop, torch.arange(TASKS_AT_ONCE))
    with PeakMemory() as memory:
        estimate = estimator.estimate(loop, carry)
    return memory.peak, flatten(estimate.gradient)


@pytest.mark.parametrize(
    ("share", "chunk", "checkpoint"), [(1.15, 8, None), (0.8, 6, None), (0.45, 6, "update"), (0.3, 4, "update")]
)
def test_plans_keep_within_their_budget(share: float, chunk: int, checkpoint: str | None) -> None:
    loop = make_loop()
    whole, gradient = measure_peak(loop)
    plan = plan_memory(loop, ESTIMATORS["truncated"](num_steps=10), TASKS_AT_ONCE, int(share * whole))
    assert plan is not None
    assert (plan.task_chunk, plan.checkpoint) == (chunk, checkpoint)
    assert plan.bytes <= share * whole
    peak, planned = measure_peak(loop, task_chunk=plan.task_chunk, checkpoint=plan.checkpoint)
    assert peak <= share * whole
    assert peak > 0.5 * share * whole
    assert (planned - gradient).norm() < 1e-5 * gradient.norm()
    assert f"{chunk} {'tasks' if chunk == TASKS_AT_ONCE else 'of 8 tasks'} at a time" in plan.describe(TASKS_AT_ONCE)
    assert ("twice" in plan.describe(TASKS_AT_ONCE)) == (checkpoint is not None)


def test_a_budget_that_holds_no_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one task's window of 10 steps takes .* MiB, and the budget is 0 MiB"):
        plan_memory(make_loop(), ESTIMATORS["truncated"](num_steps=10), 8, 1000)


def test_estimators_that_save_nothing_need_no_plan() -> None:
    assert plan_memory(make_loop(), ESTIMATORS["pes"](), 8, 1) is None


def test_the_trainer_plans_and_says_so() -> None:
    loop = make_loop()
    whole, _ = measure_peak(loop)
    results = {}
    for mib in (0, 1, 2):
        config = TrainerConfig(steps=1, tasks=8, validation_tasks=2, validation_steps=5, memory_mib=mib)
        trainer = Trainer(RULES["lstm"](), TASKS["quadratic"](dim=32), ESTIMATORS["truncated"](num_steps=10), config)
        results[mib] = (trainer.plans, trainer.sources[0].estimator.task_chunk, trainer.sources[0].estimator.checkpoint)  # type: ignore[attr-defined]
    assert whole > 2 * 2**20
    assert results[0] == ([], None, None)
    assert results[1][1:] == (4, "update")
    assert "quadratic: backpropagation takes 4 of 8 tasks at a time, computing updates twice" in results[1][0][0]
    assert results[2][1:] == (4, None)


def test_given_options_and_evolution_strategies_are_left_alone() -> None:
    for estimator in (ESTIMATORS["truncated"](num_steps=10, task_chunk=3), ESTIMATORS["pes"](num_steps=10)):
        config = TrainerConfig(steps=1, tasks=4, validation_tasks=2, validation_steps=5, memory_mib=1)
        trainer = Trainer(RULES["lstm"](), TASKS["quadratic"](), estimator, config)
        assert trainer.plans == []
        assert trainer.sources[0].estimator is estimator
