"""Compiled steps of populations: what is compiled is what plain steps do, whatever rule and family, and stays so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rule_cases import make_quick
from task_cases import FAMILIES, build
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import lopt.meta.unroll.draws
from lopt.core.random import derive_seeds, draw_uniform
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.unroll.compiled import CompiledStride, Scan
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, Rule
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.transforms import StaleGradients, Transform

TOLERANCE = 1e-3
"""Of meta-gradients: the difference of a pair's losses is about sigma of a loss."""


def draw_horizons(seeds: Tensor) -> Tensor:
    return 2 + seeds % 7


def run(
    rule: Rule, family: TaskFamily, compiled: bool, name: str = "pes", freeze: str = "nothing", **options: Any
) -> list[Estimate]:
    """Estimates on windows that cross restarts, with meta-weights that change in between."""
    rule = RULES[rule.name](**rule.config)
    for key, weight in rule.named_parameters():
        weight.requires_grad_(not key.startswith(freeze))
    estimator = ESTIMATORS[name](sigma=0.05, compile=compiled, **options)
    loop = InnerLoop(rule, family, 5, draw_horizons)
    carry = estimator.start(loop, torch.arange(3))
    found = []
    for _ in range(3):
        found.append(estimator.estimate(loop, carry))
        carry = found[-1].carry
        with torch.no_grad():
            for weight in rule.parameters():  # the frozen ones, too
                weight -= 1e-3 * weight.sign()
    return found


def assert_near(
    found: list[Estimate], expected: list[Estimate], tolerance: float = TOLERANCE, carried: float = 1e-4
) -> None:
    for a, b in zip(found, expected, strict=True):
        gradient = flatten(b)
        assert (flatten(a) - gradient).norm() <= tolerance * gradient.norm()
        for x, y in zip(tree_leaves(a.carry), tree_leaves(b.carry), strict=True):
            assert (x - y).double().norm() <= carried * y.double().norm()


def flatten(estimate: Estimate) -> Tensor:
    return torch.cat([x.flatten() for x in estimate.gradient.values()])


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are recorded, and done as they were recorded; the list tells of every recording how many operations."""
    sizes = []

    def keep(graph: torch.fx.GraphModule, leaves: list[Tensor], **options: Any) -> Any:
        sizes.append(len(graph.graph.nodes))

        def replay(*args: Tensor) -> list[Tensor]:
            assert [x.stride() for x in args] == [x.stride() for x in leaves]  # what compiled code asks for
            return [torch.stack([x, x], -1)[..., 0] for x in graph(*args)]  # it may hand out parts of larger tensors

        return replay

    monkeypatch.setattr("torch._inductor.standalone_compile", keep)
    return sizes


@pytest.mark.parametrize("name", sorted(RULES))
def test_steps_of_every_rule_can_be_recorded(name: str, traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt.rules.lopt_base.is_ready", lambda device: False)  # stages are what is recorded
    rule, family = make_quick(name), TASKS["mlp"](width=3, batch_size=4)
    found, expected = (run(rule, family, compiled, num_steps=6) for compiled in (True, False))
    assert len(traced) == 1
    assert_near(found, expected)


VARIANTS = ("vanilla rnn", "lstm", "deep transformer", "vae of patches")  # of families that are recorded as they are


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in sorted(FAMILIES)]
)
def test_steps_on_every_family_can_be_recorded(name: str, traced: list[int]) -> None:
    rule, family = RULES["momentum"](lr=0.01), build(FAMILIES[name])
    found, expected = (run(rule, family, compiled, num_steps=6) for compiled in (True, False))
    assert len(traced) == 1
    assert_near(found, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pes", {"num_steps": 6, "objective_split": "inner_valid", "task_chunk": 2}),
        ("nres", {"num_steps": 6, "freeze": "w"}),
        ("es_single", {"num_steps": 3}),
        ("es", {"num_steps": 3}),
        ("full_es", {"task_chunk": 3}),
    ],
)
def test_estimates_by_recorded_steps_are_those_of_plain_ones(
    name: str, options: dict[str, Any], traced: list[int]
) -> None:
    family = StaleGradients(TASKS["mlp"](width=2, batch_size=4))
    rule = RULES["small_fc"](hidden=2, step_mult=0.1)
    found, expected = (run(rule, family, compiled, name, **options) for compiled in (True, False))
    assert len(traced) == (2 if "task_chunk" in options and options["task_chunk"] < 3 else 1)
    assert_near(found, expected)


def test_guided_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher.*compile = false"):
        ESTIMATORS["pes"](compile=True, teacher=RULES["adam"](), imitation=1.0)


class DroppedGradients(Transform):
    """The rule sees half of every gradient, another one at each step."""

    name = key = "dropped_gradients"

    def __init__(self, family: TaskFamily) -> None:
        super().__init__(family)

    def deliver(self, tasks: dict[str, Tensor], grads: Tensor, steps: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return tasks, grads * (draw_uniform(derive_seeds(0, "drop", steps), grads.shape[1]) < 0.5)


def test_draws_within_a_step_go_on(traced: list[int]) -> None:
    rule, family = RULES["momentum"](lr=0.01), DroppedGradients(TASKS["quadratic"]())
    found, expected = (run(rule, family, compiled, num_steps=6) for compiled in (True, False))
    assert len(traced) == 1
    assert_near(found, expected)


@pytest.mark.parametrize("numbers", [0, 3 * 3 * 4 * 65])
def test_batches_may_be_drawn_in_any_blocks(numbers: int, traced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    rule, family = RULES["momentum"](lr=0.01), TASKS["mlp"](width=3, batch_size=4)
    expected = run(rule, family, compiled=False, num_steps=6)
    monkeypatch.setattr(lopt.meta.unroll.draws, "DRAWN_NUMBERS", numbers)
    for compiled in (True, False):
        found = run(rule, family, compiled, num_steps=6)
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tree_leaves(a[::2]), tree_leaves(b[::2]), strict=True))


def test_a_scan_takes_what_is_there_twice_for_two_and_hands_back_what_it_does_not_change(traced: list[int]) -> None:
    def step(carry: dict[str, Tensor], factor: Tensor, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"sum": carry["sum"] + factor * x, "name": carry["name"]}, carry["sum"] - carry["name"]

    one = torch.ones(2)
    scan = Scan(step, {"sum": one, "name": one}, one, one)
    carry, results = scan({"sum": one, "name": 3 * one}, 2 * one, [one, 5 * one])
    assert carry["sum"].tolist() == [13, 13]
    assert carry["name"].tolist() == [3, 3]
    assert [x.tolist() for x in results] == [[-2, -2], [0, 0]]


def test_compiled_steps_are_plain_steps() -> None:
    rule, family = RULES["momentum"](lr=0.01), TASKS["quadratic"]()
    found, expected = (run(rule, family, compiled, num_steps=6) for compiled in (True, False))
    assert_near(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_compiled_steps_of_every_rule_are_plain_steps(name: str) -> None:
    rule, family = make_quick(name), TASKS["mlp"](width=3, batch_size=4)
    found, expected = (run(rule, family, compiled, num_steps=6) for compiled in (True, False))
    # Steps of celo are so small that pairs differ in the losses' last bits; where a gradient is rounding alone, Adam
    # moves by its whole rate all the same.
    assert_near(found, expected, 1e-2, carried=1e-2)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no compiler\nmore", "no compiler"),
        ("failed\n a.cpp: error: no Python.h", "a.cpp: error: no Python.h"),
        ("", ""),
    ],
)
def test_machine_that_cannot_compile_is_told_so(message: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **options: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("torch._inductor.standalone_compile", fail)
    with pytest.raises(ValueError, match=rf"cannot be compiled .*\(RuntimeError: {told}\).*compile = false"):
        run(RULES["momentum"](), TASKS["quadratic"](), compiled=True, num_steps=2)


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda x: float(x), ""),
        (lambda x: torch.from_numpy(np.sin(x.numpy())), "Tensor.numpy"),
        (lambda x: torch.as_tensor(np.sin(np.asarray(x))), "Tensor.numpy"),
    ],
)
def test_a_step_that_asks_for_values_is_told_so(
    compute: Callable[[Tensor], Any], words: str, traced: list[int]
) -> None:
    def step(carry: Tensor, _: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return carry + compute(x), carry

    with pytest.raises(ValueError, match=rf"asks for values of tensors.*{words}.*compile = false"):
        Scan(step, torch.ones(1), torch.ones(1), torch.ones(1))


def test_a_carry_must_keep_its_structure(traced: list[int]) -> None:
    def step(carry: dict[str, Tensor], _: Tensor, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"b": carry["b"], "a": carry["a"]}, x

    with pytest.raises(TypeError, match="the carry changes"):
        Scan(step, {"a": torch.ones(1), "b": torch.ones(1)}, torch.ones(1), torch.ones(1))


def test_compiled_windows_resume_bitwise_and_drop_what_diverges() -> None:
    rule, family = RULES["sgd"](lr=40.0), TASKS["quadratic"]()
    loop = InnerLoop(rule, family, 5, lambda seeds: torch.full_like(seeds, 60))
    first = ESTIMATORS["pes"](num_steps=40, compile=True)
    carry = first.estimate(loop, first.start(loop, torch.arange(3))).carry
    copy = tree_map(torch.clone, carry)
    ours, theirs = (
        e.estimate(loop, c) for e, c in ((first, carry), (ESTIMATORS["pes"](num_steps=40, compile=True), copy))
    )
    assert ours.metrics["skipped_slots"] > 0
    assert all(x.isfinite().all() for x in ours.gradient.values())
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(ours[::2]), tree_leaves(theirs[::2]), strict=True))


def test_a_stride_compiles_once_for_each_kind_of_slots(traced: list[int]) -> None:
    stride, rule = CompiledStride(), RULES["momentum"]()
    loops = [InnerLoop(rule, TASKS["mlp"](width=width), 0, stride=stride) for width in (2, 3)]
    for loop in (*loops, *loops):
        slots = loop.start(torch.arange(2))
        weights = {name: w.detach().expand(2, *w.shape) for name, w in rule.named_parameters()}
        with torch.no_grad():
            stride(loop, slots, weights, 3)
    assert len(traced) == 2
