"""How much a step by kernels launches, uploads and keeps, and what the compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import lopt_kernels
from fused_cases import DEVICE, STEPS, assert_close, draw_grad, draw_start, make_rule, run, some_rules
from lopt_kernels.launching.op import count_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lopt.optim.triton_backend.step
from lopt import LearnedOptimizer
from lopt.rules.programs.registry import FUSED

ROOT = Path(__file__).parents[2]
MAX_LAUNCHES = {"adamw": 3, "lstm": 3, "rnnprop": 3, "mlp": 5, "small_fc": 8, "celo2_base": 11}


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
    original = lopt.optim.triton_backend.step.FusedStep.__init__
    monkeypatch.setattr(
        lopt.optim.triton_backend.step.FusedStep, "__init__", lambda self, *a: (made.append(1), original(self, *a))[1]
    )
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
    original = lopt.optim.triton_backend.step.upload
    monkeypatch.setattr(lopt.optim.triton_backend.step, "upload", lambda *a: (sent.append(1), original(*a))[1])
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

    def watch(module: Any, function: str, read: Callable[[dict[str, Any]], str]) -> None:
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a: (used.append(read(original(*a))), original(*a))[1])

    watch(lopt_kernels.feature_mlp.mlp, "_constexprs", lambda constants: constants["MLP"].PRECISION)
    watch(lopt_kernels.elementwise.driver, "_make_constants", lambda constants: constants["SIZES"].PRECISION)

    def change(step: int, params: list[nn.Parameter]) -> None:
        torch.set_float32_matmul_precision(["highest", "high", "medium"][step])

    before = torch.get_float32_matmul_precision()
    try:
        for name in ("lstm", "small_fc"):
            run(draw_start([(3, 4)]), name, "triton", change=change)
    finally:
        torch.set_float32_matmul_precision(before)
    assert used == ["ieee", "tf32", "tf32", "ieee", "tf32", "bf16"]


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
    command = [sys.executable, str(ROOT / "tests" / "cases" / "kernel_launches.py"), str(capability), name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({kernel for kernel, *_ in lines}) == MAX_LAUNCHES.get(name, 0) or name not in MAX_LAUNCHES
    allowed = 20 if name in ("lstm", "rnnprop") else 0  # where sizes are no multiples of 16; else these spill nothing
    assert all(int(spilled) <= allowed for _, _, spilled, _ in lines), done.stdout
