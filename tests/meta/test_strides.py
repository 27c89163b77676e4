"""Populations in memory that stays where it is: by kernels, captured, and both; estimates are those of plain steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lopt_kernels.launching.random import fold
from task_cases import FAMILIES
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from recorded_work import record

import lopt.core.random
import lopt.meta.unroll.on_gpu
import lopt.rules.programs.features
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.on_gpu import PopulationStride, capture_graph, choose_stride
from lopt.rules import RULES
from lopt.rules.programs.registry import FUSED
from lopt.tasks import TASKS
from lopt.tasks.transforms import StaleGradients

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "velo": {"hidden": 2, "width": 4, "bank": 3},
    "celo": {"hidden": 2, "width": 4},
    "lstm": {"hidden": 3},
    "rnnprop": {"hidden": 3},
    "adam": {"lr": 0.02},
    "adamw": {"lr": 0.02},
}
# Kernels and rule differ by 1e-6 of a step; the difference of a pair's losses is about sigma of a loss.
TOLERANCE = 1e-3


def draw_horizons(seeds: Tensor) -> Tensor:
    return 2 + seeds % 7


def run(
    rule: str,
    estimator: str,
    stride: Any,
    device: torch.device = CPU,
    task: Any = None,
    pairs: int = 3,
    windows: int = 3,
    **options: Any,
) -> list[Estimate]:
    """Estimates on windows that cross restarts, with meta-weights that change in between."""
    learned = RULES[rule](**SIZES.get(rule, {"hidden": 2, "step_mult": 0.01} if rule in FUSED else {})).to(device)
    family = (task or TASKS["mlp"](width=2, batch_size=4)).to(device)
    loop = InnerLoop(learned, family, 5, draw_horizons, stride=stride)
    chosen = ESTIMATORS[estimator](sigma=0.05, **options)
    carry = chosen.start(loop, torch.arange(pairs, device=device))
    found = []
    for _ in range(windows):
        before = [x.clone() for x in tree_leaves(carry)]
        found.append(chosen.estimate(loop, carry))
        assert all(torch.equal(a, b) for a, b in zip(before, tree_leaves(carry), strict=True))
        carry = found[-1].carry
        with torch.no_grad():
            for weight, gradient in zip(learned.meta_weights().values(), found[-1].gradient.values(), strict=True):
                weight -= 1e-3 * gradient.sign()
    return found


def assert_same(found: list[Estimate], expected: list[Estimate]) -> None:
    """To the bit."""
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tree_leaves(a[::2]), tree_leaves(b[::2]), strict=True))


def assert_near(found: list[Estimate], expected: list[Estimate], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        x, y = (torch.cat([g.flatten().double().cpu() for g in e.gradient.values()]) for e in (a, b))
        assert y.norm() > 0
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.fixture
def tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws as they are on a GPU; those by numpy could not be recorded."""

    def fold_in(seeds: Tensor, *counters: Tensor | int) -> Tensor:
        for counter in counters:
            seeds = fold(seeds, torch.as_tensor(counter))
        return seeds

    monkeypatch.setattr(lopt.core.random, "fold_in", fold_in)
    monkeypatch.setattr(lopt.core.random, "_to_words", lambda x: x)


@pytest.mark.usefixtures("tensors_only")
@pytest.mark.parametrize(
    ("rule", "estimator", "options"),
    [
        ("rnnprop", "pes", {"num_steps": 5}),
        ("celo", "nres", {"num_steps": 5, "task_chunk": 2}),
        ("celo", "es", {"num_steps": 4}),
        ("rnnprop", "full_es", {}),
    ],
)
def test_recorded_steps_are_plain_ones_to_the_bit(rule: str, estimator: str, options: dict[str, Any]) -> None:
    plain = run(rule, estimator, None, **options)
    assert sum(e.metrics["finished_tasks"] for e in plain) > 3
    assert_same(run(rule, estimator, PopulationStride(kernels=False, capture=record), **options), plain)


@pytest.mark.usefixtures("tensors_only")
def test_the_objective_of_recorded_steps_may_be_on_other_data() -> None:
    options = {"num_steps": 5, "objective_split": "inner_valid"}
    plain = run("rnnprop", "pes", None, **options)
    assert_same(run("rnnprop", "pes", PopulationStride(kernels=False, capture=record), **options), plain)


@pytest.mark.usefixtures("tensors_only")
@pytest.mark.parametrize("stride", [PopulationStride(kernels=False, capture=record), PopulationStride(kernels=True)])
def test_gradients_may_come_late(stride: PopulationStride) -> None:
    if stride.kernels and torch.cuda.is_available():
        pytest.skip("the kernels are compiled, and do not take tensors of the CPU")
    options = {"task": StaleGradients(TASKS["quadratic"](dim=3), 1, 2), "num_steps": 5}
    assert_near(run("adam", "pes", stride, **options), run("adam", "pes", None, **options), TOLERANCE)


def test_a_step_that_cannot_be_captured_is_made_and_said_once() -> None:
    def fail(work: Any) -> Any:
        work()  # as before a capture
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    stride = PopulationStride(kernels=False, capture=fail)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = run("rnnprop", "pes", stride, num_steps=5)
    assert [str(w.message) for w in said] == [
        "steps of populations are not captured in a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert_same(found, run("rnnprop", "pes", None, num_steps=5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, and do not take tensors of the CPU")
@pytest.mark.parametrize("rule", [pytest.param(r, marks=[] if r == "adam" else pytest.mark.slow) for r in FUSED])
def test_an_estimate_by_kernels_is_that_of_the_rule(rule: str) -> None:
    options = {"task": FAMILIES["module"](), "num_steps": 3, "pairs": 2, "windows": 1}
    assert_near(
        run(rule, "pes", PopulationStride(kernels=True), **options), run(rule, "pes", None, **options), TOLERANCE
    )


def test_imitation_takes_plain_steps_and_guidance_that_falls_no_new_memory() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    taught = {"num_steps": 5, "teacher": RULES["adam"](), "imitation": 1.0}
    assert_same(run("rnnprop", "pes", refuse, **taught), run("rnnprop", "pes", None, **taught))
    stride = PopulationStride(kernels=False)
    rule, family = RULES["sgd"](), TASKS["quadratic"](dim=3)
    for guidance in (1.0, 0.5):
        loop = InnerLoop(rule, family, 0, draw_horizons, stride=stride, guidance=guidance)
        chosen = ESTIMATORS["pes"](num_steps=2)
        chosen.estimate(loop, chosen.start(loop, torch.arange(2)))
    assert len(stride._known) == 1


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("rule", ["small_fc", "linear"])
def test_a_gpu_gets_kernels_where_there_are_some_and_graphs_where_asked_for(
    rule: str, capture: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = TASKS["quadratic"](dim=3)
    assert choose_stride(RULES[rule](), family, CPU, capture=capture) is None
    monkeypatch.setattr(lopt.meta.unroll.on_gpu, "find_missing", lambda devices, interpreted: None)
    monkeypatch.setattr(lopt.rules.programs.features, "find_shared_memory", lambda device: None)
    found = choose_stride(RULES[rule](), family, torch.device("cuda", 0), capture=capture)
    if rule == "linear" and not capture:
        assert found is None
        return
    assert found is not None
    assert found.kernels == (rule == "small_fc")
    assert found.capture is (capture_graph if capture else None)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ["pes", "full_es"])
@pytest.mark.parametrize("rule", FUSED)
def test_on_a_gpu_all_ways_give_the_same_estimate(rule: str, estimator: str) -> None:
    options: dict[str, Any] = {"num_steps": 5} if estimator == "pes" else {}
    device = torch.device("cuda")
    plain = run(rule, estimator, None, device, **options)
    for kernels, capture in ((True, None), (False, capture_graph), (True, capture_graph)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a capture that fails is said
            found = run(rule, estimator, PopulationStride(kernels=kernels, capture=capture), device, **options)
        assert_near(found, plain, TOLERANCE)
