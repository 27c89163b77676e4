"""Steps by kernels equal torch's, whatever the rule, dtype, layout and options (conftest.py: the interpreter)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import lopt_kernels
from lopt_kernels.op import count_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lopt.fused.features
import lopt.fused.step
from lopt import LearnedOptimizer
from lopt.fused import FUSED
from lopt.rules import RULES, Rule
from lopt.tensors import make_generator

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG: dict[str, dict[str, Any]] = {
    "celo": {"hidden": 2, "width": 4},
    "celo2": {"hidden": 3},
    "celo2_base": {"hidden": 3},
    "lstm": {"hidden": 2},
    "mlp": {"hidden": 3},
    "rnnprop": {"hidden": 3},
    "small_fc": {"hidden": 16},  # a tile, for tensor cores
    "velo": {"hidden": 1, "width": 4, "bank": 2},
}
SHAPES = [(), (5,), (3, 20), (20, 3), (4, 3, 2, 2), (2, 300), (3, 3, 2, 5), (0, 3), (5,)]
STEPS = 3
TOLERANCE = 3e-5  # of the movement; orthogonalisation lifts small directions, see CLOSE
CLOSE = {"celo2": 1e-4}
MAX_LAUNCHES = {"adamw": 3, "lstm": 3, "rnnprop": 3, "mlp": 5, "small_fc": 8, "celo2_base": 11}

each_rule = pytest.mark.parametrize("name", list(FUSED))
QUICK = ("adamw", "lstm", "small_fc", "celo")  # of the wider tests
some_rules = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FUSED]
)
few_rules = pytest.mark.parametrize("name", ["adamw", "rnnprop", "small_fc"])


def make_rule(name: str) -> Rule:
    rule = RULES[name](**CONFIG.get(name, {}))
    with torch.no_grad():
        for i, weight in enumerate(w for w in rule.parameters() if w.ndim):
            weight += 0.02 * torch.randn(weight.shape, generator=make_generator(i))
    return rule


def draw_start(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=make_generator(i)).to(DEVICE, dtype) for i, shape in enumerate(shapes)]


def draw_grad(p: Tensor, i: int, step: int) -> Tensor:
    """Rows differ in scale by orders."""
    generator = make_generator(1000 * step + i)
    rows = 10 ** torch.randn(p.shape[:1] + (1,) * (p.ndim - 1) if p.ndim else (), generator=generator)
    return (rows * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def run(
    start: list[Tensor],
    name: str,
    backend: str,
    steps: int = STEPS,
    change: Callable[[int, list[nn.Parameter]], None] = lambda step, params: None,
    first: LearnedOptimizer | None = None,
    g_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[list[Tensor], LearnedOptimizer]:
    """Parameters after some steps, and the optimizer."""
    params = [nn.Parameter(clone(p)) for p in start]
    if g_dtype is not None:
        for p in params:
            p.grad_dtype = g_dtype
    options = {"lr": 1.0 if name.startswith("celo2") else 10.0, "weight_decay": 1e-3, "num_steps": 20} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = LearnedOptimizer(params, make_rule(name), backend=backend, **options)
    if first is not None:
        optimizer.load_state_dict(first.state_dict())
    begin = 0 if first is None else STEPS
    for step in range(begin, begin + steps):
        for i, p in enumerate(params):
            p.grad = draw_grad(p, i, step).to(g_dtype or p.dtype)
        change(step, params)
        optimizer.step(loss=0.5 + 0.1 * step)
    return [p.detach() for p in params], optimizer


def clone(p: Tensor) -> Tensor:
    """A copy with the same strides, and with NaN in the gaps."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) if p.numel() else 0
    return torch.full((size,), torch.nan, dtype=p.dtype, device=p.device).as_strided(p.shape, p.stride()).copy_(p)


def assert_same(start: list[Tensor], name: str, tolerance: float | None = None, **options: Any) -> LearnedOptimizer:
    """Both backends make the same of `start`; returns the fused one."""
    want, torchs = run(start, name, "torch", **options)
    got, fused = run(start, name, "triton", **options)
    assert fused.backend.name == "triton"
    assert fused._dispatch.steps
    assert fused.report() == torchs.report()
    assert_close(got, want, start, CLOSE.get(name, TOLERANCE) if tolerance is None else tolerance)
    assert_states(fused, torchs)
    return fused


def assert_close(got: list[Tensor], want: list[Tensor], start: list[Tensor], tolerance: float) -> None:
    for a, b, p in zip(got, want, start, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == p.stride()
        moved = torch.linalg.vector_norm(b.double() - p.double())
        assert moved > 0 or not p.numel()
        rounding = torch.finfo(b.dtype).eps * torch.linalg.vector_norm(b.double()) / 2  # every element, once
        assert rounding < 0.05 * moved or not p.numel(), "the tolerance must not hide the step"
        assert torch.linalg.vector_norm(a.double() - b.double()) <= tolerance * moved + rounding


def assert_states(left: LearnedOptimizer, right: LearnedOptimizer, tolerance: float = 1e-4) -> None:
    states = [optimizer.state_dict()["state"] for optimizer in (left, right)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for key, value in state.items():
            other = states[1][index][key]
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            error = torch.linalg.vector_norm(value.double() - other.double())
            assert error <= tolerance * torch.linalg.vector_norm(other.double()), key


# --- what it computes ---


@each_rule
def test_fused_steps_equal_torchs(name: str) -> None:
    def spoil(step: int, params: list[nn.Parameter]) -> None:
        if step == 1:  # of the next, whose counters then differ
            params[2].grad[0, 0] = torch.nan  # type: ignore[index]

    start = draw_start()
    start[4] = start[4].to(memory_format=torch.channels_last)
    optimizer = assert_same(start, name, change=spoil)
    assert optimizer.report().skipped == 1


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


# --- memory ---


def transpose(p: Tensor) -> Tensor:
    return p.mT.contiguous().mT


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transpose,
    "channels last": lambda p: p.to(memory_format=torch.channels_last) if p.ndim == 4 else p,
    "gaps": lambda p: p.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("name", ["rnnprop", "small_fc", "celo2", "celo2_base"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_any_layout_is_stepped_where_it_lies(name: str, layout: str) -> None:
    change = LAYOUTS[layout]
    shapes = [(3, 20), (6, 4, 2, 3)]

    def lay_out(step: int, params: list[nn.Parameter]) -> None:
        if step != 1:  # in one step gradients lie otherwise than their parameters
            for p in params:
                p.grad = clone(change(p.grad.detach()))  # type: ignore[union-attr]

    start = [change(p) for p in draw_start(shapes)]
    optimizer = assert_same(start, name, change=lay_out)
    ((fused,),) = optimizer._dispatch.steps.values()
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
    start = draw_start([(3, 20), (4, 4), (3, 20), (2, 300), (4, 3, 2, 2)])
    want, _ = run(start, "celo2", "triton")
    monkeypatch.setattr(lopt.fused.features, "STEP_BYTES", 4 * 120)
    got, optimizer = run(start, "celo2", "triton")
    ((fused,),) = optimizer._dispatch.steps.values()
    sizes = [[part.p.numel() for part in batch.parts] for batch in fused.program.made]  # type: ignore[attr-defined]
    assert sorted(map(sorted, sizes)) == [[16, 48], [60, 60], [600]]
    assert_close(got, want, start, CLOSE["celo2"])


@some_rules
def test_state_goes_over_from_one_backend_to_the_other(name: str) -> None:
    start = draw_start([(3, 20), (5, 4), (4, 3, 2, 2)])
    want, _ = run(start, name, "torch", steps=2 * STEPS)
    for backends in (("torch", "triton"), ("triton", "torch")):
        middle, first = run(start, name, backends[0])
        got, _ = run(middle, name, backends[1], first=deepcopy(first))
        assert_close(got, want, start, 10 * CLOSE.get(name, TOLERANCE))


@some_rules
def test_two_runs_are_equal_bit_for_bit(name: str) -> None:
    start = draw_start([(3, 20), (5, 4), (4, 3, 2, 2)])
    (first, _), (second, _) = (run(start, name, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- launches ---


class Operations(TorchDispatchMode):
    """How many operations of torch ran while the mode was on."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@some_rules
def test_launches_do_not_grow_with_the_number_of_tensors(name: str) -> None:
    def count(shapes: list[tuple[int, ...]]) -> tuple[int, int]:
        """Kernels and operations of the last step."""
        params = [nn.Parameter(p) for p in draw_start(shapes)]
        groups = [{"params": params[:1]}, {"params": params[1:], "num_steps": 30}]
        optimizer = LearnedOptimizer(groups, make_rule(name), num_steps=20, backend="triton")
        for i, p in enumerate(params):
            p.grad = draw_grad(p, i, 0)
        optimizer.step(loss=1.0)
        with count_launches() as counter, Operations() as operations:
            optimizer.step(loss=1.0)
        return counter.launches, operations.count

    kernels, operations = count([(3, 4), (2, 3), (2, 2, 2, 2)])
    assert kernels <= MAX_LAUNCHES.get(name, 12)
    more = count([(3, 4), (2, 3), (2, 2, 2, 2)] * 2)
    assert more[0] == kernels
    views = 2 * 3  # the interpreter looks at every tensor
    assert more[1] - operations <= views * 20


def test_tables_are_made_again_only_when_parameters_or_state_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = lopt.fused.step.FusedStep.__init__
    monkeypatch.setattr(lopt.fused.step.FusedStep, "__init__", lambda self, *a: (made.append(1), original(self, *a))[1])
    kept = []

    def change(step: int, params: list[nn.Parameter]) -> None:
        kept.append([p.grad for p in params])  # held: the next gradients lie elsewhere
        if step == STEPS - 1:
            params[0].grad = None

    _, optimizer = run(draw_start([(3, 4), (5,)]), "small_fc", "triton", change=change)
    assert len(made) == 2
    params = optimizer.param_groups[0]["params"]
    for step in range(4):  # in turns, as of the two networks of a GAN
        params[0].grad = torch.ones_like(params[0]) if step % 2 else None
        optimizer.step()
    assert len(made) == 2
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert len(made) == 3


def test_nothing_is_sent_to_the_device_in_a_steady_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    original = lopt.fused.step.upload
    monkeypatch.setattr(lopt.fused.step, "upload", lambda *a: (sent.append(1), original(*a))[1])
    grads = [torch.ones(3, 4, device=DEVICE), torch.ones(5, device=DEVICE)]
    counts = []

    def change(step: int, params: list[nn.Parameter]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        counts.append(len(sent))

    run(draw_start([(3, 4), (5,)]), "celo", "triton", change=change)
    assert counts == [0, 3, 3]  # gradients' addresses, rates, plans


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(FUSED))
def test_graph_may_be_captured_with_gradients_of_its_own(name: str) -> None:
    """As in torch's recipe: gradients are made inside of the graph, so that they lie elsewhere than before."""
    start = draw_start([(3, 20), (5, 4)])
    results = []
    for captured in (False, True):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = LearnedOptimizer(params, make_rule(name), lr=1.0, num_steps=20, backend="triton")
        x = torch.ones((), device=DEVICE)

        def step(params: list[nn.Parameter] = params, optimizer: LearnedOptimizer = optimizer, x: Tensor = x) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss = sum((p * p * x).sum() for p in params)
            loss.backward()  # type: ignore[union-attr]
            optimizer.step(loss=loss)  # type: ignore[arg-type]

        step()
        if not captured:
            for _ in range(3):
                step()
        else:
            graph = torch.cuda.CUDAGraph()
            optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                step()
            for _ in range(3):
                graph.replay()
        results.append([p.detach() for p in params])
    assert_close(results[1], results[0], start, 1e-4)


def test_precision_of_products_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for module in (lopt_kernels.mlp, lopt_kernels.coordinatewise_lstm):
        original = module._constexprs
        monkeypatch.setattr(module, "_constexprs", lambda *a, f=original: (used.append(f(*a)["PRECISION"]), f(*a))[1])

    def change(step: int, params: list[nn.Parameter]) -> None:
        torch.set_float32_matmul_precision(["highest", "high", "medium"][step])

    before = torch.get_float32_matmul_precision()
    try:
        for name in ("lstm", "small_fc"):
            run(draw_start([(3, 4)]), name, "triton", change=change)
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == ["ieee", "tf32", "tf32", "ieee", "tf32", "bf16"]


# --- choice of the backend ---


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
    assert len(optimizer._dispatch.steps) == (name == "small_fc")  # celo's schedule sees all tensors
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

    try_triton = lopt_kernels.op.try_triton
    monkeypatch.setattr(lopt_kernels.op, "_probe", {(1,): fail})  # its launch
    monkeypatch.setattr(lopt_kernels.op, "check_triton", lambda *_: None)
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


@few_rules
def test_gradient_scaler_is_obeyed_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LearnedOptimizer, "_is_skipped_on_host", lambda self: False)
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


# --- training ---


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


# --- compilation ---


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=[pytest.mark.slow] * ((name, capability) != ("mlp", 90)))
        for name in FUSED
        for capability in (80, 90)
        if name != "adam"  # it is adamw's
    ],
)
def test_every_kernel_of_a_step_compiles_without_spills(name: str, capability: int) -> None:
    """In fp32, exactly and with tf32, in bf16 with random rounding and sanitized gradients, in fp16 under a scaler."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(ROOT / "tests" / "kernel_launches.py"), str(capability), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({kernel for kernel, *_ in lines}) == MAX_LAUNCHES.get(name, 0) or name not in MAX_LAUNCHES
    allowed = 20 if name in ("lstm", "rnnprop") else 0  # where sizes are no multiples of 16; else these spill nothing
    assert all(int(spilled) <= allowed for _, _, spilled, _ in lines), done.stdout
