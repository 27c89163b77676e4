"""Ascending on f is descending on its negative, to the bit: for rules that read the loss, and under the guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contract_cases import assert_same, clone, copy_state, is_same
from fused_cases import SIZES, draw_grad
from rule_cases import make_quick
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES
from lopt.rules.building_blocks.last_loss import LOSS_KEY

READS_LOSS = [name for name in sorted(RULES) if RULES[name].needs_loss]
SHAPES = ((3, 4), (4,), (3, 4), ())
LOSSES = [0.5 - 0.01 * step for step in range(12)] + [9.0, float("inf"), *[0.4] * 40]
GUARD = {"window": 4, "max_window": 8, "patience": 8, "cooldown": 1}

each_reader = pytest.mark.parametrize("name", [*READS_LOSS, "star"])


def follow(
    name: str, sign: float, losses: Sequence[float], ascends: Sequence[bool], **options: Any
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Steps on `sign` times a function, a group for every tensor; and what `step` returned is what it was given."""
    params = [nn.Parameter(torch.randn(shape, generator=make_generator(i))) for i, shape in enumerate(SHAPES)]
    config: dict[str, Any] = {"inner": "celo"} if name == "star" else SIZES.get(name, {})
    groups = [{"params": [p], "maximize": ascend} for p, ascend in zip(params, ascends, strict=True)]
    optimizer = LearnedOptimizer(groups, make_quick(name, **config), lr=10.0, num_steps=100, **options)
    for step, loss in enumerate(losses):
        for i, p in enumerate(params):
            p.grad = sign * draw_grad(p, i, step)
        given = torch.tensor(sign * loss)
        assert optimizer.step(lambda given=given: given) is given  # type: ignore[arg-type, return-value, misc]
    return clone(params), optimizer


def assert_mirrored(name: str, losses: Sequence[float], ascends: Sequence[bool], **options: Any) -> LearnedOptimizer:
    """Parameters, and all state, the guard's memory with it."""
    params, optimizer = follow(name, 1.0, losses, ascends, **options)
    others, other = follow(name, -1.0, losses, [not ascend for ascend in ascends], **options)
    assert_same(others, params)
    for group in other.param_groups:
        group["maximize"] = not group["maximize"]
    mirrored, state = copy_state(other), copy_state(optimizer)
    assert_same(mirrored["state"], state["state"])
    assert repr(mirrored["param_groups"]) == repr(state["param_groups"])  # NaN of the guard's memory included
    return optimizer


@each_reader
def test_ascending_is_descending_on_the_negative_loss(name: str) -> None:
    assert_mirrored(name, LOSSES[:4], [False] * 4)
    others = [follow(name, 1.0, losses, [False] * 4)[0] for losses in (LOSSES[:4], LOSSES[3::-1])]
    assert not is_same(*others)  # the loss counts


@pytest.mark.parametrize("name", ["celo", "velo"])
def test_ascending_is_descending_on_the_negative_loss_by_kernels(name: str) -> None:
    pytest.importorskip("triton")
    assert_mirrored(name, LOSSES[:2], [False] * 4, backend="triton")
    assert_mirrored(name, LOSSES[:2], [True, False, True, False], backend="triton")


@each_reader
def test_each_group_is_told_the_loss_that_it_descends_on(name: str) -> None:
    ascends = [True, False, False, True]
    optimizer = assert_mirrored(name, LOSSES[:4], ascends)
    for (p,), ascend in zip((group["params"] for group in optimizer.param_groups), ascends, strict=True):
        mean = next(value for key, value in optimizer.state[p].items() if key.endswith(("loss_mean", LOSS_KEY)))
        assert bool((mean < 0).all() if ascend else (mean > 0).all())


@pytest.mark.parametrize("name", ["celo", "adam"])
def test_guard_judges_an_ascent_by_the_negative_loss(name: str) -> None:
    report = assert_mirrored(name, LOSSES, [False] * 4, guard=GUARD).report()
    assert min(report.failures, report.fallbacks, report.returns, report.adamw_steps) > 0


def test_guard_refuses_groups_of_which_some_ascend() -> None:
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [p], "maximize": True}, {"params": [q]}]
    with pytest.raises(ValueError, match="an optimizer of their own, or leave out the guard"):
        LearnedOptimizer(groups, make_quick("adam"), guard=True)
    optimizer = LearnedOptimizer([{"params": [p]}, {"params": [q]}], make_quick("adam"), guard=True)
    optimizer.param_groups[0]["maximize"] = True
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="some have maximize=True"):
        optimizer.step(loss=1.0)  # type: ignore[call-arg]
    assert torch.equal(p, q)
    assert bool((p == 1).all())
