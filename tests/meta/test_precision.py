"""Base learners in bf16: the meta-gradient keeps its direction, and nothing but their losses is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import make_quick
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.tasks import TASKS

FAMILIES = {
    "conv": {"width": 4, "batch_size": 32},
    "mlp": {"width": 16, "batch_size": 32},
    "char_transformer": {"width": 16, "depth": 1, "batch_size": 4, "length": 8},
}


def estimate(rule: str, family: str, precision: str, name: str = "truncated", **options: Any) -> tuple[Tensor, Any]:
    """The meta-gradient of the second window of 10 steps, flat in float64, and the slots after it."""
    loop = InnerLoop(make_quick(rule), TASKS[family](**FAMILIES[family]), 0)
    begin = ESTIMATORS[name](num_steps=10, **options)
    carry = begin.estimate(loop, begin.start(loop, torch.arange(8))).carry  # both start there, and see the same batches
    found = ESTIMATORS[name](num_steps=10, precision=precision, **options).estimate(loop, carry)
    assert found.num_tasks == 8
    return torch.cat([g.flatten() for g in found.gradient.values()]).double(), found.carry


@pytest.mark.parametrize("rule", ["gradient_memory", "rnnprop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_gradient_keeps_its_direction(rule: str, family: str) -> None:
    """What is asked of it (cosine above .99) before a run may be trained in bf16."""
    exact, rounded = (estimate(rule, family, precision)[0] for precision in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_rounded_and_nothing_else(family: str) -> None:
    _, exact = estimate("gradient_memory", family, "fp32")
    _, rounded = estimate("gradient_memory", family, "bf16")
    pairs = list(zip(tree_leaves(exact), tree_leaves(rounded), strict=True))
    assert all(a.dtype == b.dtype for a, b in pairs)
    assert torch.equal(exact.ids, rounded.ids)
    # bf16 has 8 binary digits: losses that were averaged in it would be multiples of 2^-8 of themselves.
    assert not torch.equal(rounded.loss, rounded.loss.bfloat16().float())
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.05, atol=0.05)


def test_evolution_strategies_take_it() -> None:
    exact, rounded = (estimate("gradient_memory", "conv", p, "pes", sigma=0.1)[0] for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.9  # differences of losses are rounded, too


def test_second_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order=2 needs precision='fp32', got 'bf16'; set order=1"):
        ESTIMATORS["full"](order=2, precision="bf16")
    with pytest.raises(ValueError, match="order=2 needs precision='fp32', got 'bf16'; set order=1"):
        InnerLoop(make_quick("lstm"), TASKS["quadratic"](), 0, order=2, precision="bf16")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision"):
        ESTIMATORS["pes"](precision="fp8")
    with pytest.raises(ValueError, match="precision"):
        InnerLoop(make_quick("lstm"), TASKS["quadratic"](), 0, precision="fp8")
