"""Sick runs are told from healthy ones, on made-up logs and on real runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from estimator_cases import Balance, FirstState, constant

from lopt.cli.diagnosis import Finding, diagnose, measure_truncation
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS

CONFIG = TrainerConfig(steps=100, tasks=8, clip=1.0)


def make_log(**changes: Any) -> list[dict[str, Any]]:
    """A healthy log of 100 steps, with values or functions of the step in place of some."""
    usual: dict[str, Any] = {
        "skipped_slots": 0.0, "gradient_norm": 0.5, "inner_steps_per_second": 1000.0, "gradient_noise": 0.8,
    }  # fmt: skip
    lines: list[dict[str, Any]] = []
    for step in range(1, 101):
        values = {key: value(step) if callable(value) else value for key, value in (usual | changes).items()}
        lines.append({"kind": "train", "step": step, **values})
        if step % 10 == 0:
            final = changes["final"](step) if "final" in changes else 1 / step
            lines.append({"kind": "validation", "step": step, "final": final})
    return [{"kind": "validation", "step": 0, "final": 1.0}, *lines]


def find_sick(lines: list[dict[str, Any]]) -> list[Finding]:
    return [finding for finding in diagnose(lines, CONFIG, 8) if finding.sick]


def test_a_healthy_log_has_no_findings_but_tells_its_figures() -> None:
    found = diagnose(make_log(), CONFIG, 8)
    assert not any(finding.sick or finding.advice for finding in found)
    told = " ".join(finding.what for finding in found)
    for part in ("dead slots: 0.0%", "norm 0.5", "0.8 x its norm", "best 0.01 at step 100", "1,000 inner steps/s"):
        assert part in told


@pytest.mark.parametrize(
    ("changes", "what", "advice"),
    [
        ({"skipped_slots": 2.0}, "dead slots: 25.0%", "lower the rule's output scale"),
        ({"gradient_norm": lambda step: 1.1**step}, "meta-gradient", "it explodes"),
        ({"gradient_norm": lambda step: 1e6 if step % 20 == 0 else 1.0}, "above 100 x its median in 5.0%", "explodes"),
        ({"gradient_norm": lambda step: None if step == 50 else 1.0}, "not finite in 1 steps", "explodes"),
        ({"gradient_norm": None}, "not finite in any outer step", "dead slots"),
        ({"gradient_norm": lambda step: 0.0 if step > 50 else 1.0}, "0 in the last", "nothing reaches"),
        ({"gradient_noise": 10.0}, "10 x its norm", "average more"),
        ({"final": lambda step: 1.0 + step}, "1 untrained, best 1 at step 0", "never beat the untrained"),
        ({"final": lambda step: 0.1 if step == 20 else 0.5}, "best 0.1 at step 20", "second half brought nothing"),
        ({"inner_steps_per_second": lambda step: 1e3 / step}, "speed", "another program"),
    ],
)  # fmt: skip
def test_each_sickness_is_found_and_only_it(changes: dict[str, Any], what: str, advice: str) -> None:
    sick = find_sick(make_log(**changes))
    assert len(sick) == 1
    assert what in sick[0].what
    assert advice in sick[0].advice


def test_a_log_that_has_just_begun_says_so() -> None:
    assert "only 0 outer steps" in diagnose([], CONFIG, 8)[0].what


def test_the_log_of_a_run_that_diverges_names_its_dead_slots(tmp_path: Any) -> None:
    from lopt.meta.loggers.json_lines import read_metrics

    config = TrainerConfig(steps=8, tasks=4, validation_tasks=2, validation_steps=5, learning_rate=1e-9)
    for lr, sick in ((1e12, True), (0.001, False)):
        folder = tmp_path / str(lr)
        trainer = Trainer(RULES["sgd"](lr=lr), TASKS["quadratic"](), ESTIMATORS["truncated"](), config, folder=folder)
        with pytest.raises(ValueError, match="diverges on all 2") if sick else nullcontext():
            trainer.run()
        lines = read_metrics(folder / "metrics.jsonl")
        assert [f.sick for f in diagnose(lines, config, 4) if "dead slots" in f.what] == [sick]


def test_the_bias_of_short_windows_is_measured() -> None:
    loop = InnerLoop(Balance(), FirstState(), 0, constant(100))
    biased = measure_truncation(loop, ESTIMATORS["truncated"](num_steps=2), 1, 100)
    assert biased[0].sick
    assert "windows of 2 has cosine -1.00" in biased[0].what
    assert "take pes" in biased[0].advice
    enough = measure_truncation(loop, ESTIMATORS["truncated"](num_steps=50), 1, 100)
    assert not enough[0].sick
    assert measure_truncation(loop, ESTIMATORS["pes"](num_steps=2), 1, 100) == []
    assert measure_truncation(loop, ESTIMATORS["truncated"](num_steps=100), 1, 100) == []


def test_the_bias_is_measured_on_several_tasks_of_a_learned_rule() -> None:
    torch.manual_seed(0)
    loop = InnerLoop(RULES["lstm"](hidden=4), TASKS["quadratic"](), 0, constant(40))
    (found,) = measure_truncation(loop, ESTIMATORS["truncated"](num_steps=5), 4, 20)
    assert "4 tasks" in found.what
