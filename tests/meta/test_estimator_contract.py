"""What every estimator promises, tried on all of `ESTIMATORS`: a new one is covered without a change here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from estimator_cases import Bowl, Drift, Trap, constant, fit, flatten
from torch import Tensor
from torch.utils._pytree import tree_leaves
from training_cases import check_resume, fit_init, make_config

from lopt.core.tensors import Params
from lopt.meta.config.load import parse_config
from lopt.meta.estimators import ESTIMATORS, Estimator
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS
from lopt.tasks.base import Batch

pytestmark = pytest.mark.parametrize("name", ESTIMATORS)
QUADRATIC = TASKS["quadratic"](dim=4)


def build(name: str, num_steps: int, **options: Any) -> Estimator:
    return ESTIMATORS[name](num_steps=num_steps, **ESTIMATORS[name].quick_config | options)


def test_it_resumes_bitwise(name: str, tmp_path: Path) -> None:
    raw = make_config(steps=8, validate_every=3, checkpoint_every=3).to_dict()
    options = {"name": name, "num_steps": 4, **ESTIMATORS[name].quick_config}
    config = parse_config(fit_init(raw | {"estimator": options, "rule": {"name": "linear"}}))
    check_resume(config, tmp_path, stop=5, resumes=3)


def test_it_depends_on_its_carry_alone_and_changes_neither_carry_nor_rule(name: str) -> None:
    rule = fit(name, RULES["momentum"](lr=0.01), QUADRATIC)
    loop = InnerLoop(rule, QUADRATIC, 0, constant(9))
    estimator = build(name, 4)
    carry = estimator.estimate(loop, estimator.start(loop, torch.arange(3))).carry
    before = [x.clone() for x in (*tree_leaves(carry), *rule.parameters())]
    first, second = estimator.estimate(loop, carry), build(name, 4).estimate(loop, carry)
    after = (*tree_leaves(carry), *rule.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(w.grad is None for w in rule.parameters())
    assert torch.equal(flatten(first.gradient), flatten(second.gradient))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(first.carry), tree_leaves(second.carry), strict=True))


def test_any_share_of_the_slots_gives_the_same_mean(name: str) -> None:
    loop, means = InnerLoop(fit(name, RULES["momentum"](lr=0.01), QUADRATIC), QUADRATIC, 0, constant(9)), []
    for shares in ((6,), (2, 4), (1, 2, 3)):
        estimator = build(name, 4)
        carries = [estimator.start(loop, ids) for ids in torch.arange(6).split(list(shares))]
        for _ in range(3):  # of which one at least has new tasks
            estimates = [estimator.estimate(loop, carry) for carry in carries]
            carries = [estimate.carry for estimate in estimates]
        assert [estimate.num_tasks for estimate in estimates] == list(shares)
        means.append(sum(flatten(e.gradient).double() * e.num_tasks for e in estimates) / 6)
    assert means[0].abs().max() > 0
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=1e-5, atol=1e-6)  # float32, in batches of other sizes


def test_its_gradient_of_a_quadratic_meta_loss_is_right_within_its_noise(name: str) -> None:
    """After t steps the parameters are t theta: the gradient of a window is the mean of t (t theta - target)."""
    if ESTIMATORS[name].needs_init:
        pytest.skip("is no gradient of a meta-loss; tests/meta/test_reptile.py has its formula")
    errors, exact = [], torch.zeros(2, dtype=torch.float64)
    rule, family, estimator = Drift(2), Bowl(), build(name, 3)
    for seed in range(12):
        loop = InnerLoop(rule, family, seed, constant(8))
        carry = estimator.start(loop, torch.arange(32))
        error = torch.zeros_like(exact)
        for _ in range(3):
            family.ages.clear()
            found = estimator.estimate(loop, carry)
            ages = torch.cat(family.ages).double()[:, None]
            right = (ages * (ages * rule.theta.detach() - family.target)).mean(0)
            error, exact, carry = error + flatten(found.gradient) - right, exact + right / 12, found.carry
        errors.append(error)
    mean, deviation = torch.stack(errors).mean(0), torch.stack(errors).std(0) / len(errors) ** 0.5
    assert deviation.norm() < 0.1 * exact.norm()  # the test can tell
    wrong = mean.abs() > 4 * deviation + 1e-9 * exact.abs()
    assert wrong.any() == estimator.truncates, (mean, deviation, exact)


@pytest.mark.parametrize("bad", [(1,), (0, 2, 3), (0, 1, 2, 3)])
def test_it_drops_tasks_that_are_not_finite_and_no_others(name: str, bad: tuple[int, ...]) -> None:
    family, estimator = Trap("loss", bad), build(name, 5)
    rule = fit(name, RULES["lstm"](hidden=3), family)
    family.spec  # draws one task for the shapes  # noqa: B018
    family.drawn = 0
    loop = InnerLoop(rule, family, 0, constant(5))
    estimate = estimator.estimate(loop, estimator.start(loop, torch.arange(4)))
    assert estimate.num_tasks == 4 - len(bad)
    assert estimate.metrics["skipped_slots"] == len(bad)
    assert flatten(estimate.gradient).isfinite().all()
    assert all(x.isfinite().all() for x in tree_leaves(estimate.carry))  # new tasks, which are not poisoned
    again = estimator.estimate(loop, estimate.carry)
    assert again.num_tasks == 4
    good = torch.tensor([i for i in range(4) if i not in bad])
    if not len(good):
        assert flatten(estimate.gradient).abs().max() == 0
        return
    loop = InnerLoop(rule, Trap("loss", ()), 0, constant(5))
    alone = estimator.estimate(loop, estimator.start(loop, good))
    torch.testing.assert_close(flatten(estimate.gradient), flatten(alone.gradient), rtol=1e-3, atol=1e-6)


class Still(type(QUADRATIC)):  # type: ignore[misc]
    """The loss is the same wherever the parameters are."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 2 + 0 * super().loss(params, batch)


def test_its_gradient_is_zero_where_nothing_depends_on_the_weights(name: str) -> None:
    loop = InnerLoop(fit(name, RULES["momentum"](lr=0.01), QUADRATIC), Still(dim=4), 0, constant(9))
    estimator = build(name, 4)
    carry = estimator.start(loop, torch.arange(3))
    for _ in range(3):
        estimate = estimator.estimate(loop, carry)
        carry = estimate.carry
        assert flatten(estimate.gradient).abs().max() == 0
        assert estimate.num_tasks == 3


def test_its_metrics_are_there_and_add_up(name: str) -> None:
    loop = InnerLoop(fit(name, RULES["momentum"](lr=0.001), QUADRATIC), QUADRATIC, 0, constant(4))
    estimator = build(name, 4, loss_clamp=1e9)
    estimate = estimator.estimate(loop, estimator.start(loop, torch.arange(3)))
    assert set(estimate.metrics) == set(estimator.metrics)
    assert all(type(value) is float and value == value for value in estimate.metrics.values())
    assert estimate.metrics["objective"] == pytest.approx(estimate.metrics["loss"])  # "mean"
    assert estimate.metrics["meta_loss"] > 0
    assert estimate.metrics["finished_tasks"] >= 3  # each in this window, at its horizon or, staggered, before
    assert estimate.metrics["inner_steps"] % (3 * 4) == 0
    assert estimate.metrics["skipped_slots"] == estimate.metrics["imitation_loss"] == 0
