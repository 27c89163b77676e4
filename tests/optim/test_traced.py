"""What nobody sees but the clock: no graph breaks under torch.compile, no waiting for a device, few operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from rule_cases import make_quick
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES

SHAPES = [(4, 3), (4, 3), (5,), (5,), (2, 3, 3, 3), ()]
QUICK = ["lstm", "small_fc", "celo2", "velo"]
every_rule = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in RULES]
)


def make(
    name: str, shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu", **options: Any
) -> LearnedOptimizer:
    """Named parameters under a rule, with gradients."""
    params = [nn.Parameter(torch.randn(shape, generator=make_generator(i))) for i, shape in enumerate(shapes)]
    params = [nn.Parameter(p.detach().to(device)) for p in params]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = LearnedOptimizer(named, make_quick(name), num_steps=20, weight_decay=0.01, **options)
    set_grads(optimizer, 0)
    return optimizer


def list_params(optimizer: LearnedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: LearnedOptimizer, step: int) -> None:
    for i, p in enumerate(list_params(optimizer)):
        p.grad = torch.randn(p.shape, generator=make_generator(100 * step + i)).to(p.device)


# -- torch.compile ---------------------------------------------------------------------------------


@every_rule
def test_compiled_step_is_one_graph_and_does_as_the_plain_one(name: str) -> None:
    """`fullgraph` raises at a graph break; a learning rate in a tensor changes without a new graph."""
    torch._dynamo.reset()
    plain, compiled = (make(name, lr=torch.tensor(10.0)) for _ in range(2))
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for i in range(4):
        for optimizer in (plain, compiled):
            set_grads(optimizer, i)
            optimizer.param_groups[0]["lr"].fill_(10.0 / (i + 1))
            if i == 2:
                list_params(optimizer)[0].grad[0, 0] = float("nan")  # type: ignore[index]
        plain.step(loss=torch.tensor(1.0 / (i + 1)))
        step(loss=torch.tensor(1.0 / (i + 1)))
    assert counter.frame_count == 1
    assert plain.report().skipped == compiled.report().skipped == 1
    first, second = (list_params(optimizer)[0] for optimizer in (plain, compiled))
    assert [int(optimizer.state[p]["step"]) for optimizer, p in ((plain, first), (compiled, second))] == [3, 3]
    # a tensor that is skipped in a graph still counts in rules that look at all of them
    tolerance = 0.1 if RULES[name].tensor_keys else 1e-4
    for a, b, start in zip(list_params(compiled), list_params(plain), list_params(make(name)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float((b - start).detach().abs().max()))


@pytest.mark.slow
def test_compiled_step_follows_an_open_run_and_its_cool_down() -> None:
    torch._dynamo.reset()
    optimizers = [LearnedOptimizer(list_params(make("base")), make_quick("base")) for _ in range(2)]
    counter = torch._dynamo.testing.CompileCounter()
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=True, backend=counter)]
    for i in range(6):
        for optimizer, step in zip(optimizers, steps, strict=True):
            set_grads(optimizer, i)
            if i == 3:
                optimizer.cool_down(4)
            step()
    assert counter.frame_count == 2
    for a, b, start in zip(*map(list_params, optimizers), list_params(make("base")), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float((b - start).detach().abs().max()))


FUSED = ["adamw", "lstm", "small_fc", "celo2", "velo"]


@pytest.mark.parametrize(
    "name",
    # One program of each kind, and the rule that looks at all tensors: the others are traced by the same lines.
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("small_fc", "celo2"))) for name in FUSED],
)
def test_kernels_stay_one_node_of_a_compiled_step(name: str) -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    shapes = SHAPES[1:4]
    options: dict[str, Any] = {"lr": torch.tensor(10.0), "backend": "triton"}
    plain, compiled = (make(name, shapes, **options) for _ in range(2))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(compiled.step, fullgraph=True, backend=keep)
    for i in range(3):
        for optimizer in (plain, compiled):
            set_grads(optimizer, i)
        plain.step(loss=torch.tensor(1.0))
        step(loss=torch.tensor(1.0))
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "fused_step" in str(node.target)]
    assert len(nodes) == {"velo": 0, "celo2": 2}.get(name, 1)  # its row of all tensors is traced; with AdamW's
    for a, b, start in zip(list_params(compiled), list_params(plain), list_params(make(name, shapes)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float((b - start).detach().abs().max()))


def test_closure_of_a_compiled_step_is_called() -> None:
    torch._dynamo.reset()
    optimizer = make("sgd")
    step = torch.compile(optimizer.step, backend="eager")
    assert float(step(lambda: torch.tensor(3.0))) == 3.0


@pytest.mark.slow
def test_step_compiled_by_inductor_does_as_the_plain_one() -> None:
    torch._dynamo.reset()
    plain, compiled = (make("small_fc", lr=torch.tensor(10.0)) for _ in range(2))
    step = torch.compile(compiled.step, fullgraph=True)
    for i in range(3):
        for optimizer, call in ((plain, plain.step), (compiled, step)):
            set_grads(optimizer, i)
            call()
    for a, b, start in zip(list_params(compiled), list_params(plain), list_params(make("small_fc")), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float((b - start).detach().abs().max()))


# -- devices ---------------------------------------------------------------------------------------


class Uploads(TorchDispatchMode):
    """Copies from the host to another device while the mode was on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [x for x in args if isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim > 0]
        if isinstance(result, Tensor) and result.device.type != "cpu" and sources:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0), torch.ones((), device="meta")], ids=["number", "cpu", "device"])
def test_step_waits_for_no_device_and_uploads_nothing(name: str, lr: float | Tensor) -> None:
    """Tensors of the meta device have no values: whoever asks for one is refused, as is who copies host memory."""
    optimizer = make(name, [*SHAPES, (300, 300)], device="meta")
    loss = torch.empty((), device="meta")
    optimizer.step(loss=loss)  # makes the state
    optimizer.param_groups[0]["lr"] = lr
    with Uploads() as uploads:
        optimizer.step(loss=loss)
        optimizer.step(lambda: 1.0)
    assert not uploads.found


def test_gradient_scaler_is_obeyed_without_waiting() -> None:
    """What `GradScaler.step` leaves in the optimizer for a step that it wants unscaled or skipped."""
    optimizer = make("small_fc", device="meta")
    optimizer.step()
    optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device="meta") for _ in range(2))  # type: ignore[attr-defined]
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", QUICK)
def test_step_is_captured_in_a_cuda_graph(name: str) -> None:
    optimizers = [make(name, device="cuda", lr=10.0, capturable=True) for _ in range(2)]
    graph, loss = torch.cuda.CUDAGraph(), torch.ones((), device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for optimizer in optimizers:
            optimizer.step(loss=loss)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizers[0].step(loss=loss)
    for _ in range(3):
        graph.replay()
        optimizers[1].step(loss=loss)
    for a, b in zip(*map(list_params, optimizers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# -- operations ------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """How many operations ran while the mode was on."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_number_of_operations_does_not_grow_with_the_number_of_equal_tensors(name: str, shape: tuple[int, ...]) -> None:
    counts = set()
    for number in (2, 5, 60):
        optimizer = make(name, [shape] * number)
        optimizer.step(loss=1.0)
        with Operations() as operations:
            optimizer.step(loss=1.0)
        counts.add(operations.count)
    assert len(counts) == 1
