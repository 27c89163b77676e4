"""The path of devices that are not waited for: what is skipped is decided by masks. Here it is forced on the CPU."""

from __future__ import annotations

import pytest
import torch
from rule_cases import make_quick
from torch import Tensor, nn

import lopt.optim.learned_optimizer
import lopt.optim.torch_backend.step
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES

SHAPES = [(4, 3), (4, 3), (4, 3), (5,), (5,), (7, 2), (6,)]
IN_BUCKET, ALONE = 1, 5


@pytest.mark.parametrize("guard", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "guarded"])
@pytest.mark.parametrize("name", RULES)
def test_masked_tensors_keep_every_bit_and_the_others_move(
    name: str, guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lopt.optim.torch_backend.step, "is_readable", lambda x: False)
    params = [nn.Parameter(torch.randn(s, generator=make_generator(i))) for i, s in enumerate(SHAPES)]
    rule = make_quick(name)
    optimizer = LearnedOptimizer(params, rule, lr=10.0, num_steps=20, weight_decay=0.1, guard=guard)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=make_generator(100 * step + i))
        if step == 2:
            for i in (IN_BUCKET, ALONE):
                params[i].grad[0, 0] = float("nan")  # type: ignore[index]
        before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in params]
        optimizer.step(loss=1.0)
    for i, (p, (old, state)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) == (i in (IN_BUCKET, ALONE))
        assert int(optimizer.state[p]["step"]) == (2 if i in (IN_BUCKET, ALONE) else 3)
        assert p.isfinite().all()
        for key, value in optimizer.state[p].items():
            assert value.isfinite().all(), key
            if i in (IN_BUCKET, ALONE):
                assert torch.equal(value, state[key]), key
    assert optimizer.report().skipped == 2


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize("name", ["adamw", "small_fc", "velo"])
def test_gradient_scaler_is_obeyed_by_masks(
    name: str, guard: bool, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same steps without a scaler; the second of them overflows."""
    monkeypatch.setattr(lopt.optim.torch_backend.step, "is_readable", lambda x: False)
    monkeypatch.setattr(lopt.optim.learned_optimizer, "is_skipped_on_host", lambda found_inf: False)

    def run(scaled: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.randn(s, generator=make_generator(i))) for i, s in enumerate(SHAPES)]
        rule = make_quick(name)
        optimizer = LearnedOptimizer(params, rule, lr=10.0, num_steps=20, guard=guard, capturable=capturable)
        scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=scaled)
        for step in range(3):
            if step == 1 and not scaled:
                continue
            optimizer.zero_grad()
            inputs = [torch.randn(p.shape, generator=make_generator(50 * step + i)) for i, p in enumerate(params)]
            loss = sum((p * x).sum() for p, x in zip(params, inputs, strict=True))
            scaler.scale(loss).backward()  # type: ignore[arg-type]
            if step == 1:
                params[3].grad[0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer, loss=1.0)
            scaler.update()
        return [p.detach() for p in params]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
