"""Which parameters kernels step, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import lopt_kernels
from fused_cases import DEVICE, TOLERANCE, assert_close, draw_start, list_steps, run
from torch import nn

from lopt import LearnedOptimizer
from lopt.rules import RULES


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {}, "there is no fused step for rule 'linear'"),
        ("small_fc", {"guard": True}, "the guard"),
    ],
)
def test_fallback_is_named_once(name: str, options: dict[str, Any], message: str) -> None:
    params = [nn.Parameter(p) for p in draw_start([(3, 4)])]
    with pytest.warns(UserWarning, match=f"backend='triton' falls back to torch: {message}"):
        optimizer = LearnedOptimizer(params, RULES[name](), backend="triton", **options)
    assert optimizer.backend.name == "torch"
    assert message in optimizer.backend.reason


@pytest.mark.parametrize("name", ["small_fc", "celo"])
def test_what_kernels_do_not_take_torch_steps(name: str) -> None:
    start = [*draw_start([(3, 4)]), *draw_start([(4, 2)], torch.float64)]
    want, _ = run(start, name, "torch")
    with pytest.warns(UserWarning, match=r"kernels do not step a parameter of torch.float64 with a gradient"):
        got, optimizer = run(start, name, "triton")
    assert len(list_steps(optimizer)) == (name == "small_fc")  # celo's schedule sees all tensors
    assert_close(got, want, start, TOLERANCE)


def test_wide_networks_fall_back() -> None:
    params = [nn.Parameter(p) for p in draw_start([(3, 4)])]
    with pytest.warns(UserWarning, match="at most 128, not"):
        LearnedOptimizer(params, RULES["small_fc"](hidden=129), backend="triton")
    with pytest.warns(UserWarning, match="at most 64 wide, not 65"):
        LearnedOptimizer(params, RULES["lstm"](hidden=65), backend="triton")


def test_machine_where_triton_cannot_compile_is_stepped_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError("no C compiler")

    try_triton = lopt_kernels.launching.op.try_triton
    monkeypatch.setattr(lopt_kernels.launching.op, "probe", {(1,): fail})  # its launch
    monkeypatch.setattr(lopt_kernels.launching.op, "check_triton", lambda *_: None)
    try_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="falls back to torch: FileNotFoundError: no C compiler"):
            optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2, device=DEVICE))], backend="triton")
    finally:
        try_triton.cache_clear()
    assert optimizer.backend.name == "torch"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of machines without a GPU")
def test_auto_never_interprets() -> None:
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))])
    assert optimizer.backend == ("torch", "no parameter is on a GPU")
