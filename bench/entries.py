"""What is timed as an optimizer step: torch's AdamW, rules, and rules done the naive way; and on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lopt
from bench import naive
from bench.models import Shapes
from lopt.rules import RULES

FOREACH, FUSED = "torch AdamW foreach", "torch AdamW fused"
SEED = 0
NUM_STEPS = 1000  # that rules with a schedule are told; more than are ever made here
PRECISIONS = {"ieee": "highest", "tf32": "high", "bf16": "medium"}  # as `torch.set_float32_matmul_precision` has them

Params = dict[str, nn.Parameter]


class Started(NamedTuple):
    """An optimizer that is ready.

    Attributes:
        step: one step.
        list_held: the tensors that it holds beside parameters and gradients: first the state, then all else. To be
            called after the first step.
        backend: what computes the step, and why, if there is a choice.
    """

    step: Callable[[], object]
    list_held: Callable[[], tuple[list[Tensor], list[Tensor]]]
    backend: tuple[str, str] | None = None


class Entry(NamedTuple):
    """Something to time.

    Attributes:
        start: makes it out of named parameters that have gradients; `capturable` by a CUDA graph, where one has to say.
        state_bytes: of state per parameter, estimated; 0 for what is never skipped.
        rule: the rule that it is, or that it does naively.
    """

    name: str
    start: Callable[..., Started]
    state_bytes: float = 0.0
    rule: str = ""


def start_torch(params: Params, capturable: bool = False, **options: bool) -> Started:
    """`torch.optim.AdamW`."""
    optimizer = torch.optim.AdamW(params.values(), capturable=capturable, **options)
    return Started(optimizer.step, lambda: ([x for state in optimizer.state.values() for x in state.values()], []))


def start_rule(
    params: Params, name: str, options: Mapping[str, Any], precision: str | None = None, capturable: bool = False
) -> Started:
    """`lopt.LearnedOptimizer` with a rule as constructed by default and these options of the optimizer.

    Args:
        precision: of matrix products during its steps, one of `PRECISIONS`; None: whatever is set.
    """
    optimizer = lopt.LearnedOptimizer(
        params.items(), RULES[name](), num_steps=NUM_STEPS, capturable=capturable, **options
    )
    step = partial(optimizer.step, loss=1.0) if optimizer.rule.needs_loss else optimizer.step
    if precision is not None:
        step = partial(step_with_precision, step, PRECISIONS[precision])

    def list_held() -> tuple[list[Tensor], list[Tensor]]:
        weights = [x for rule in optimizer.replicas.list_rules() for x in (*rule.parameters(), *rule.buffers())]
        return [x for state in optimizer.state.values() for x in state.values()], weights

    return Started(step, list_held, (optimizer.backend.name, optimizer.backend.reason))


def step_with_precision(step: Callable[[], object], precision: str) -> None:
    """A step while `torch.set_float32_matmul_precision` is set to that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        step()
    finally:
        torch.set_float32_matmul_precision(before)


def start_naive(params: Params, name: str, capturable: bool = False) -> Started:
    """The rule of that name as `bench.naive` does it, with random weights."""
    update, widths = naive.UPDATES[name]
    device = next(iter(params.values())).device
    layers = [(weight.to(device), bias.to(device)) for weight, bias in naive.draw_layers(widths)]
    optimizer = naive.NaiveOptimizer(params.values(), update, layers)
    return Started(
        optimizer.step,
        lambda: (
            [x for state in optimizer.state.values() for x in state.values()],
            [x for layer in layers for x in layer],
        ),
    )


def estimate_state_bytes(name: str, dtype: torch.dtype | None = None) -> float:
    """Bytes of state per parameter, from a matrix of 256 x 256; with a state of that dtype, if one is given."""
    p = torch.zeros(256, 256, dtype=torch.float32)
    accumulators = RULES[name]().init_state({"p": p}).accumulators["p"]
    widest = 8 if dtype is None else dtype.itemsize
    return sum(x.numel() * min(widest, x.element_size()) for x in accumulators.values()) / p.numel()


def make_rule_entry(name: str, label: str = "", precision: str | None = None, **options: Any) -> Entry:
    """A rule under `LearnedOptimizer` with these options; `label` tells it from the rule with others."""
    size = estimate_state_bytes(name, options.get("state_dtype"))
    start = partial(start_rule, name=name, options=options, precision=precision)
    return Entry(f"{name} {label}".strip(), start, size, name)


def list_torch_entries() -> list[Entry]:
    """What rules are compared with."""
    return [Entry(FOREACH, partial(start_torch, foreach=True)), Entry(FUSED, partial(start_torch, fused=True))]


def list_entries(rules: tuple[str, ...], naives: tuple[str, ...], **options: Any) -> Iterator[Entry]:
    """AdamW first, then the rules under these options, each after its naive form."""
    yield from list_torch_entries()
    for name in dict.fromkeys((*rules, *naives)):
        if name in naives:
            yield Entry(f"naive {name}", partial(start_naive, name=name), 16.0, name)
        if name in rules:
            yield make_rule_entry(name, **options)


def draw(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients; the gradients' scale differs by tensor and by row."""
    generator = torch.Generator().manual_seed(SEED)
    randn = partial(torch.randn, generator=generator)
    params, grads = [], []
    for shape in shapes.values():
        params.append((0.02 * randn(shape)).to(device, dtype))
        rows = torch.exp(randn(shape[:1] + (1,) * (len(shape) - 1)))
        tensor = 10.0 ** (-4 * float(torch.rand((), generator=generator, dtype=torch.float32)))
        grads.append((tensor * rows * randn(shape)).to(device, dtype))
    return params, grads
