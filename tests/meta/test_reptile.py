"""Reptile: its formula by hand, what it refuses, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from estimator_cases import constant, fit, flatten
from torch.func import grad, vmap

from lopt.meta.estimators import ESTIMATORS
from lopt.meta.trainer.meta_weights import freeze_weights
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, LearnedInit
from lopt.tasks.sinusoid import Sinusoid

FAMILY = Sinusoid(shots=5, width=6)


def test_its_gradient_is_how_far_tasks_go_from_the_start() -> None:
    rule = fit("reptile", RULES["sgd"](lr=0.05), FAMILY)
    assert isinstance(rule, LearnedInit)
    start = FAMILY.init({}, torch.Generator().manual_seed(1))
    rule.set_initial(start)
    reptile, loop = ESTIMATORS["reptile"](num_steps=3), InnerLoop(rule, FAMILY, 0)
    slots = reptile.start(loop, torch.arange(4))
    found = reptile.estimate(loop, slots)
    params = {k: p.expand(4, *p.shape) for k, p in start.items()}
    batch = loop.batch(slots)
    for _ in range(3):
        slopes = vmap(grad(FAMILY.loss))(params, batch)
        params = {k: p - 0.05 * slopes[k] for k, p in params.items()}
    for name, p in params.items():
        expected = (start[name] - p).mean(0)
        torch.testing.assert_close(found.gradient[f"init.{name}"], expected, rtol=1e-4, atol=1e-6)


def test_following_it_brings_the_start_nearer_to_where_tasks_end() -> None:
    rule = fit("reptile", RULES["sgd"](lr=0.01), FAMILY)
    assert isinstance(rule, LearnedInit)
    rule.set_initial(FAMILY.init({}, torch.Generator().manual_seed(1)))
    reptile, loop = ESTIMATORS["reptile"](num_steps=5, objective="final"), InnerLoop(rule, FAMILY, 0)
    carry, losses = reptile.start(loop, torch.arange(8)), []
    for _ in range(150):
        estimate = reptile.estimate(loop, carry)
        carry = estimate.carry
        losses.append(estimate.metrics["loss"])
        for name, weight in rule.meta_weights().items():
            weight.data -= 0.5 * estimate.gradient[name]
    assert sum(losses[-30:]) < 0.8 * sum(losses[:30])
    assert flatten(estimate.gradient).abs().max() > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RULES["sgd"](), r"'sgd' does not say: add a section \[init\]"),
        (
            lambda: LearnedInit({k: list(p.shape) for k, p in FAMILY.init({}, torch.Generator()).items()}),
            "inner.lr.*train_only",
        ),
    ],
)
def test_rules_that_it_cannot_learn_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ESTIMATORS["reptile"]().start(InnerLoop(make(), FAMILY, 0, constant(3)), torch.arange(2))


def test_frozen_weights_make_a_rule_fit() -> None:
    rule = LearnedInit({k: list(p.shape) for k, p in FAMILY.init({}, torch.Generator()).items()}, "lstm", {"hidden": 2})
    freeze_weights(rule, ["init.*"])
    assert ESTIMATORS["reptile"](num_steps=2).start(InnerLoop(rule, FAMILY, 0), torch.arange(2)).horizon.tolist() == [
        2,
        2,
    ]


def test_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="leave the teacher out"):
        ESTIMATORS["reptile"](teacher=RULES["sgd"]())
