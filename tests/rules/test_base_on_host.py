"""Rule `base` by compiled code is the rule by its stages, up to rounding; and where it cannot be, the stages step."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lopt_kernels.host import compiled, rotated_adam
from lopt_kernels.host.rotated_adam import HostStep
from torch import Tensor, nn

import lopt
from lopt.core.tensors import Params
from lopt.meta.unroll.rule_calls import call_rule
from lopt.rules import RULES, State

# Sides of 1, below, at and above those of a vector of the processor and of a tile, and beyond `max_side`.
SHAPES = [(17, 5), (64, 33), (16, 16), (3, 300), (270, 16), (259, 270), (8, 3, 3, 3), (1, 9), (33,), (1,), ()]
STEPS = 30


@pytest.fixture(autouse=True)
def _needs_code() -> None:
    if not rotated_adam.is_available():
        pytest.skip("no compiler")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step by compiled code."""
    made: list[int] = []
    real = HostStep.step

    def step(self: HostStep, *args: Tensor) -> Tensor:
        made.append(1)
        return real(self, *args)

    monkeypatch.setattr(HostStep, "step", step)
    return made


def draw_gradients(shapes: list[tuple[int, ...]], steps: int) -> Iterator[list[Tensor]]:
    """Gradients with rows of very different scale, a common part that makes momentum, and rows of 0 in a table."""
    generator = torch.Generator().manual_seed(3)
    common = [torch.randn(shape, generator=generator) for shape in shapes]
    scales = [10 ** torch.empty(shape[:1]).uniform_(-1, 1, generator=generator) for shape in shapes]
    for _ in range(steps):
        grads = [(c + torch.randn(c.shape, generator=generator)) for c in common]
        grads = [g * s.reshape(-1, *[1] * (g.ndim - 1)) if g.ndim else g for g, s in zip(grads, scales, strict=True)]
        grads[4][torch.rand(270, generator=generator) < 0.7] = 0
        yield grads


def run_optimizer(
    told: bool, planned: bool, steps: int = STEPS, state_dtype: torch.dtype = torch.float32
) -> lopt.LearnedOptimizer:
    """An optimizer after `steps` steps, with and without loss and plan."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (17, 5), (33,)]]
    nn.init.ones_(params[-1])  # as gains of a normalisation begin
    nn.init.normal_(params[-2], std=1e-3)
    options = {"lr": 0.7, "weight_decay": 0.1, "num_steps": 40 if planned else None, "state_dtype": state_dtype}
    optimizer = lopt.LearnedOptimizer(params, RULES["base"](init_std=0.3), **options)
    for i, grads in enumerate(draw_gradients([*SHAPES, (17, 5), (33,)], steps)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step(loss=torch.tensor(2.0 + math.sin(i)) if told else None)
    return optimizer


def list_tensors(optimizer: lopt.LearnedOptimizer) -> dict[str, Tensor]:
    params = optimizer.param_groups[0]["params"]
    return {f"{i} p": p.detach() for i, p in enumerate(params)} | {
        f"{i} {key}": x for i, p in enumerate(params) for key, x in optimizer.state[p].items()
    }


def assert_near(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor is within a share of its norm; an absolute floor is for cosines that are 0 but for rounding.

    How a gradient agrees with a first step is a difference of sums that are nearly equal, in which float32 has three
    or four digits, here as there; so has the average of it, and what follows from that has more.
    Bases are not compared: eigenvectors whose values are within rounding of each other, as those of 0 are, may be
    turned among themselves, and steps are the same.
    """
    assert found.keys() == right.keys()
    for key, x in found.items():
        if key.endswith("basis"):
            continue
        y = right[key].double()
        error = float((x.double() - y).norm()) / (float(y.norm()) + 1e-2)
        assert error <= tolerance * (20 if key.endswith(("agreement", "measured", "gain")) else 1), (key, error)


def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotated_adam, "is_available", lambda: False)


@pytest.mark.parametrize(("told", "planned"), [(True, True), (False, True), (True, False), (False, False)])
def test_compiled_steps_of_an_optimizer_equal_the_stages(
    told: bool, planned: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list_tensors(run_optimizer(told, planned))
    assert len(calls) == STEPS
    without_code(monkeypatch)
    right = list_tensors(run_optimizer(told, planned))
    assert len(calls) == STEPS
    assert_near(found, right, 1e-3)


def test_compiled_steps_with_bases_in_bfloat16_equal_the_stages(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list_tensors(run_optimizer(True, True, state_dtype=torch.bfloat16))
    assert len(calls) == STEPS
    without_code(monkeypatch)
    right = list_tensors(run_optimizer(True, True, state_dtype=torch.bfloat16))
    compact = {key for key, x in found.items() if x.dtype is torch.bfloat16}
    assert compact == {key for key in found if key.endswith(("factor", "basis"))}
    # What is rounded the other way here and there is one part in 256.
    assert_near(found, right, 1e-2)


def run_rule(count: int, own_weights: bool, which: slice = slice(None)) -> tuple[Params, State]:
    """Some of `count` slots through `STEPS` steps, on views of flat parameters as meta-training has them."""
    rule, generator = RULES["base"](init_std=0.3), torch.Generator().manual_seed(1)
    shapes = SHAPES[:5] + SHAPES[6:]
    sizes = [math.prod(shape) for shape in shapes]

    def cut(flat: Tensor) -> Params:
        pieces = torch.split(flat, sizes, -1)
        return {str(i): x.view(-1, *shape) for i, (x, shape) in enumerate(zip(pieces, shapes, strict=True))}

    weights = {
        name: (w.detach() + 0.2 * torch.randn(count, *w.shape, generator=generator))[which]
        for name, w in rule.named_parameters()
    }
    scales = 10 ** torch.empty(count, 1).uniform_(-2, 1, generator=generator)
    params = cut(torch.randn(count, sum(sizes), generator=generator)[which])
    state, common = rule.init_state(params, 1), torch.randn(count, sum(sizes), generator=generator)
    num_steps = torch.arange(STEPS, STEPS + count)[which]
    with torch.no_grad():
        for _ in range(STEPS):
            grads = cut((scales * (common + torch.randn(count, sum(sizes), generator=generator)))[which])
            loss = torch.rand(count, generator=generator)[which] + 0.5
            args = (grads, params, state, loss, num_steps)
            params, state = call_rule(rule, weights if own_weights else None, *args)
    return params, state


def flatten(params: Params, state: State) -> dict[str, Tensor]:
    accumulators = {f"{n} {key}": x for n, acc in state.accumulators.items() for key, x in acc.items()}
    return params | accumulators | {"step": state.step}


@pytest.mark.parametrize("own_weights", [False, True])
def test_compiled_steps_of_a_batch_equal_the_stages(
    own_weights: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = flatten(*run_rule(3, own_weights))
    assert len(calls) == STEPS
    without_code(monkeypatch)
    assert_near(found, flatten(*run_rule(3, own_weights)), 1e-3)


def test_a_slot_moves_to_the_same_bits_in_any_batch() -> None:
    together, alone = flatten(*run_rule(3, False)), flatten(*run_rule(3, False, slice(1, 2)))
    for key in ("m", "v", "left_factor", "left_basis", "right_basis"):
        assert torch.equal(together[f"1 {key}"][1:2], alone[f"1 {key}"])


def test_a_pure_update_leaves_what_it_is_given() -> None:
    rule, params = RULES["base"](), {"w": torch.randn(2, 5, 4), "b": torch.randn(2, 5)}
    state = rule.init_state(params, 1)
    with torch.no_grad():
        for _ in range(2):  # bases are renewed in both
            before = {key: x.clone() for key, x in flatten(params, state).items()}
            grads = {key: torch.randn_like(p) for key, p in params.items()}
            after = rule.update(grads, params, state, torch.ones(2), torch.full((2,), 9))
            assert all(torch.equal(x, before[key]) for key, x in flatten(params, state).items())
            params, state = after


def test_a_run_that_is_resumed_goes_on_to_the_same_bits() -> None:
    whole, half = run_optimizer(True, True), run_optimizer(True, True, 12)
    params = half.param_groups[0]["params"]
    resumed = lopt.LearnedOptimizer(params, half.rule, num_steps=40)
    resumed.load_state_dict(half.state_dict())
    for i, grads in enumerate(draw_gradients([*SHAPES, (17, 5), (33,)], STEPS)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        if i >= 12:
            resumed.step(loss=torch.tensor(2.0 + math.sin(i)))
    right = list_tensors(whole)
    assert all(torch.equal(x, right[key]) for key, x in list_tensors(resumed).items())


def test_a_gradient_that_is_not_finite_leaves_its_parameter_alone() -> None:
    params = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))]
    before, after = (p.detach().clone() for p in params)
    optimizer = lopt.LearnedOptimizer(params, RULES["base"](), num_steps=9)
    params[0].grad, params[1].grad = torch.full((4, 4), math.nan), torch.randn(4, 4)
    optimizer.step(loss=1.0)
    assert torch.equal(params[0], before)
    assert not torch.equal(params[1], after)
    assert optimizer.report().skipped == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("float64", {}),
        ("bfloat16", {}),
        ("transposed", {}),
        ("float32", {"guard": True}),
        ("float32", {"nonfinite": "sanitize"}),
    ],
)
def test_stages_step_what_compiled_code_does_not_take(kind: str, options: dict[str, object], calls: list[int]) -> None:
    dtype = getattr(torch, kind, torch.float32) if kind != "transposed" else torch.float32
    p = torch.randn(4, 6, dtype=dtype)
    p = nn.Parameter(p.mT if kind == "transposed" else p)
    before, p.grad = p.detach().clone(), torch.randn_like(p)
    lopt.LearnedOptimizer([p], RULES["base"](), num_steps=9, **options).step(loss=1.0)
    assert not calls
    assert not torch.equal(p, before)


def test_derivatives_are_those_of_the_stages(calls: list[int]) -> None:
    rule, params = RULES["base"](), {"w": torch.randn(3, 3)}
    new, _ = rule.update({"w": torch.randn(3, 3)}, params, rule.init_state(params), num_steps=torch.tensor(5))
    new["w"].sum().backward()
    assert rule.log_size.grad is not None
    assert rule.log_size.grad != 0
    assert not calls


def test_subnormal_numbers_count_again_after_a_step() -> None:
    optimizer = run_optimizer(True, True, 1)
    assert optimizer.state
    assert float(torch.tensor(1e-39) * 1) > 0


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for libraries, and nothing loaded yet."""
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "kept"))
    for cached in (compiled.load_library, rotated_adam._load):
        cached.cache_clear()
    yield tmp_path / "kept"
    for cached in (compiled.load_library, rotated_adam._load):
        cached.cache_clear()


def test_without_a_compiler_the_stages_step_and_one_line_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = run_optimizer(True, True, 3)
    assert [str(w.message).count("\n") for w in told if "C++ compiler" in str(w.message)] == [0]
    monkeypatch.setattr(rotated_adam, "is_available", lambda: False)
    right = list_tensors(run_optimizer(True, True, 3))
    assert all(torch.equal(x, right[key]) for key, x in list_tensors(found).items())


def test_a_library_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rotated_adam.is_available()
    assert [file.suffix for file in fresh.iterdir()] == [".so"]
    compiled.load_library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", None)  # would be called
    assert compiled.load_library("rotated_adam") is not None


def test_a_compiler_that_does_not_know_the_processor_is_asked_for_any(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "NATIVE", ("-march=nothing",))
    assert rotated_adam.is_available()
    assert_near(list_tensors(run_optimizer(True, True, 3)), list_tensors(run_optimizer(True, True, 3)), 0)


def test_a_library_that_others_may_write_is_not_loaded(fresh: Path) -> None:
    assert rotated_adam.is_available()
    next(fresh.iterdir()).chmod(0o777)
    compiled.load_library.cache_clear()
    with pytest.warns(UserWarning, match="others may write"):
        assert compiled.load_library("rotated_adam") is None


def test_the_environment_can_switch_it_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOPT_HOST_CODE", "0")
    assert not rotated_adam.is_available()
    assert not fresh.exists()
