"""Steps by kernels equal torch's, whatever the rule, dtype and options (conftest.py: the interpreter)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_cases import (
    DEVICE,
    STEPS,
    TOLERANCE,
    assert_close,
    assert_same,
    assert_states,
    draw_grad,
    draw_start,
    each_rule,
    few_rules,
    make_rule,
    run,
    some_rules,
)
from torch import Tensor, nn

import lopt.optim.learned_optimizer
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules.programs.registry import FUSED


@each_rule
def test_fused_steps_equal_torchs(name: str) -> None:
    def spoil(step: int, params: list[nn.Parameter]) -> None:
        if step == 1:  # of the next, whose counters then differ
            params[2].grad[0, 0] = torch.nan  # type: ignore[index]
            params[4].grad[1, 0] = -1e38  # type: ignore[index]

    start = draw_start()
    start[4] = start[4].to(memory_format=torch.channels_last)
    optimizer = assert_same(start, name, change=spoil)
    assert optimizer.report().skipped == 1
    assert optimizer.report().limited == 1


@few_rules
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True, "nonfinite": "sanitize"},
        {"lr": torch.tensor(3.0), "weight_decay": 0.0},
        {"nonfinite": "raise"},
    ],
)
def test_options_mean_what_they_mean_to_torch(name: str, options: dict[str, Any]) -> None:
    def spoil(step: int, params: list[nn.Parameter]) -> None:
        if options.get("nonfinite") == "sanitize":
            params[0].grad[0, :2] = torch.tensor([torch.nan, torch.inf])  # type: ignore[index]

    assert_same(draw_start([(3, 20), (5,)]), name, change=spoil, **options)


@few_rules
def test_groups_have_rates_of_their_own_and_follow_schedulers(name: str) -> None:
    def divide(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "lr": 2.0}, {"params": params[1:2], "rule": "adamw"}, {"params": params[2:]}]

    start = draw_start([(3, 20), (5,), (4, 4), (4, 4)])
    params = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    for own, backend in zip(params, ("torch", "triton"), strict=True):
        optimizer = LearnedOptimizer(divide(own), make_rule(name), lr=10.0, backend=backend)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(STEPS):
            for i, p in enumerate(own):
                p.grad = draw_grad(p, i, step) if (i, step) != (3, 1) else None
            optimizer.step()
            scheduler.step()
    assert_close([p.detach() for p in params[1]], [p.detach() for p in params[0]], start, TOLERANCE)


@few_rules
@pytest.mark.parametrize(("dtype", "g_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_low_precision_parameters_are_rounded_once(name: str, dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    start = draw_start([(3, 20), (7,), (4, 3, 2, 2)], dtype)
    (want, torchs), (got, fused) = (run(start, name, backend, g_dtype=g_dtype) for backend in ("torch", "triton"))
    for a, b, p in zip(got, want, start, strict=True):
        unit = torch.finfo(dtype).eps * (b.abs() + p.abs()).double()  # the interpreter cuts bf16 off where a GPU rounds
        assert ((a.double() - b.double()).abs() <= STEPS * unit).all()
    assert_states(fused, torchs, 0.05 if dtype == torch.bfloat16 else 1e-2)


@few_rules
def test_rounding_at_random_is_torchs(name: str) -> None:
    start = draw_start([(3, 20), (7,)], torch.bfloat16)
    options: dict[str, Any] = {"stochastic_rounding": True, "lr": 1e-2, "weight_decay": 0.0, "steps": 2}
    want, _ = run(start, name, "torch", **options)
    got, _ = run(start, name, "triton", **options)
    nearest, _ = run(start, name, "triton", **options | {"stochastic_rounding": False})
    different = [float((a != b).float().mean()) for a, b in zip(got, want, strict=True)]
    assert max(different) <= 0.15  # the step's last bits cross a threshold here and there
    assert any(not torch.equal(a, b) for a, b in zip(got, nearest, strict=True))


@some_rules
def test_tensors_of_several_dtypes_are_stepped_in_one_step(name: str) -> None:
    start = [*draw_start([(3, 20), (5, 4)]), *draw_start([(4, 6)], torch.float16)]
    assert_same(start, name, 2e-3, lr=100.0 if name.startswith("celo2") else 10.0)  # steps that fp16 can hold


@pytest.mark.parametrize("name", ["lstm", "rnnprop"])
def test_state_in_bfloat16_is_torchs(name: str) -> None:
    start = draw_start([(3, 20), (5,), (5,)])
    options: dict[str, Any] = {"state_dtype": torch.bfloat16}
    want, torchs = run(start, name, "torch", **options)
    got, fused = run(start, name, "triton", **options)
    assert_close(got, want, start, 2e-2)
    assert_states(fused, torchs, 2e-2)
    kept = [x for state in fused.state.values() for x in state.values() if x.is_floating_point()]
    assert {x.dtype for x in kept} == {torch.bfloat16}


@few_rules
def test_gradient_scaler_is_obeyed_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lopt.optim.learned_optimizer, "is_skipped_on_host", lambda found_inf: False)
    results = []
    for backend in ("torch", "triton"):
        params = [nn.Parameter(p) for p in draw_start([(3, 20), (5,)])]
        optimizer = LearnedOptimizer(params, make_rule(name), lr=10.0, capturable=True, backend=backend)
        scaler = torch.amp.GradScaler(DEVICE.type, 1024.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = sum((p * draw_grad(p, i, step)).sum() for i, p in enumerate(params))
            scaler.scale(loss).backward()  # type: ignore[arg-type]
            if step == 1:
                params[1].grad[0] = torch.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach() for p in params])
    assert_close(results[1], results[0], draw_start([(3, 20), (5,)]), TOLERANCE)


class Transformer(nn.Module):
    """One block on characters, 1,700 parameters."""

    def __init__(self, width: int = 12, size: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y = self.norms[0](h)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        h = h + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        result: Tensor = self.head(h + self.mlp(self.norms[1](h)))
        return result


def train(name: str, backend: str, steps: int) -> list[float]:
    model = Transformer()
    for i, p in enumerate(model.parameters()):
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=make_generator(i)) * (0.3 if p.ndim > 1 else 0.1))
    model.to(DEVICE)
    lr = {"adamw": 1.0, "celo2": 3.0, "celo2_base": 10.0, "velo": 0.1, "celo": 0.1}.get(name, 1.0)
    optimizer = LearnedOptimizer(model.named_parameters(), make_rule(name), lr=lr, num_steps=steps, backend=backend)
    losses = []
    for step in range(steps):
        start = torch.randint(16, (8, 1), generator=make_generator(step)).to(DEVICE)
        text = (start + 3 * torch.arange(9, device=DEVICE)) % 16  # every character tells the next
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    return losses


SLOW_TRAININGS = set(FUSED) - {"adamw"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_TRAININGS)) for name in FUSED]
)
def test_training_a_transformer_goes_the_same_way(name: str) -> None:
    steps = 500 if DEVICE.type == "cuda" else 20
    want, got = (torch.tensor(train(name, backend, steps)) for backend in ("torch", "triton"))
    assert ((got - want).abs() <= 1e-3 * want).all()
    assert want[-1] != want[0]
