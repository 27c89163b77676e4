"""Steps by kernels wherever parameters and state lie, and from step to step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

pytest.importorskip("triton")

from fused_cases import (
    CLOSE,
    DEVICE,
    TOLERANCE,
    assert_close,
    assert_same,
    clone,
    draw_grad,
    draw_start,
    list_steps,
    make_rule,
    run,
    some_rules,
)
from torch import Tensor, nn

import lopt.rules.programs.features
from lopt import LearnedOptimizer


def transpose(p: Tensor) -> Tensor:
    return p.mT.contiguous().mT


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transpose,
    "channels last": lambda p: p.to(memory_format=torch.channels_last) if p.ndim == 4 else p,
    "gaps": lambda p: p.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[pytest.mark.slow] * (name == "celo2" and layout != "transposed"))
        for name in ("rnnprop", "small_fc", "celo2", "celo2_base")
        for layout in LAYOUTS
    ],
)
def test_any_layout_is_stepped_where_it_lies(name: str, layout: str) -> None:
    change = LAYOUTS[layout]
    shapes = [(3, 20), (4, 3, 2, 3)]

    def lay_out(step: int, params: list[nn.Parameter]) -> None:
        if step != 1:  # in one step gradients lie otherwise than their parameters
            for p in params:
                p.grad = clone(change(p.grad.detach()))  # type: ignore[union-attr]

    start = [change(p) for p in draw_start(shapes)]
    optimizer = assert_same(start, name, change=lay_out)
    (fused,) = list_steps(optimizer)
    assert (
        fused.copies == {"transposed": 2, "channels last": 1, "gaps": 4}[layout]
    )  # of gradients; gaps: and parameters


def test_parameters_are_kept_inside_their_bounds() -> None:
    start = draw_start([(3, 20), (7,)])
    buffers = [torch.full((p.numel() + 512,), torch.nan, device=DEVICE) for p in start]
    params = [nn.Parameter(b[256:-256].view(p.shape).copy_(p)) for b, p in zip(buffers, start, strict=True)]
    optimizer = LearnedOptimizer(params, make_rule("small_fc"), backend="triton")
    for i, p in enumerate(params):
        p.grad = draw_grad(p, i, 0)
    optimizer.step()
    for buffer in buffers:
        assert torch.cat([buffer[:256], buffer[-256:]]).isnan().all()
        assert buffer[256:-256].isfinite().all()


@pytest.mark.parametrize("name", ["small_fc", "celo2_base"])
def test_default_dtype_of_torch_does_not_reach_the_kernels(name: str) -> None:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        params = [nn.Parameter(p) for p in draw_start([(3, 20), (5,)])]
        optimizer = LearnedOptimizer(params, make_rule(name), lr=10.0, backend="triton")
        for i, p in enumerate(params):
            p.grad = draw_grad(p, i, 0)
        torch.set_default_dtype(dtype)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["small_fc", "celo2_base"])
def test_empty_windows_are_stepped_over(name: str) -> None:
    start = draw_start([(3, 20)])
    want, _ = run(start, name, "triton")
    got, _ = run([*start, torch.empty(2, 3, 0, device=DEVICE)], name, "triton")
    assert torch.equal(got[0], want[0])


def test_parameter_that_turns_in_place_is_stepped_as_it_lies() -> None:
    def turn(step: int, params: list[nn.Parameter]) -> None:
        if step == 1:  # same address, same shape
            params[0].data = params[0].data.T

    start = draw_start([(6, 6)])
    (want, _), (got, _) = (run(start, "rnnprop", backend, change=turn) for backend in ("torch", "triton"))
    assert torch.linalg.vector_norm(got[0] - want[0]) <= TOLERANCE * torch.linalg.vector_norm(want[0].T - start[0])


def test_what_is_kept_between_steps_is_not_the_state() -> None:
    _, optimizer = run(draw_start([(3, 20), (5,)]), "velo", "triton")
    held = [weakref.ref(x) for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    assert held
    optimizer.state.clear()
    gc.collect()
    assert not any(reference() is not None for reference in held)


def test_celo2_keeps_the_steps_of_a_bounded_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    start = draw_start([(3, 20), (4, 4), (3, 20), (2, 70), (4, 3, 2, 2)])
    want, _ = run(start, "celo2", "triton", steps=1)
    monkeypatch.setattr(lopt.rules.programs.features, "STEP_BYTES", 4 * 120)
    got, optimizer = run(start, "celo2", "triton", steps=1)
    (fused,) = list_steps(optimizer)
    sizes = [[view.p.numel() for view in tables.views] for tables in fused.program.passes]  # type: ignore[attr-defined]
    assert sorted(map(sorted, sizes)) == [[16, 48], [60, 60], [140]]
    assert_close(got, want, start, CLOSE["celo2"])


@some_rules
def test_state_goes_over_from_one_backend_to_the_other(name: str) -> None:
    start = draw_start([(3, 20), (5, 4), (4, 3, 2, 2)])
    want, _ = run(start, name, "torch", steps=4)
    for backends in (("torch", "triton"), ("triton", "torch")):
        middle, first = run(start, name, backends[0], steps=2)
        got, _ = run(middle, name, backends[1], steps=2, first=deepcopy(first))
        assert_close(got, want, start, 10 * CLOSE.get(name, TOLERANCE))


@some_rules
def test_two_runs_are_equal_bit_for_bit(name: str) -> None:
    start = draw_start([(3, 20), (5, 4), (4, 3, 2, 2)])
    (first, _), (second, _) = (run(start, name, "triton", steps=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
