"""Star: the nominal term is Adam, the residual is bounded, and the inner rule is run as it would be alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.optim.torch_backend import chunked
from lopt.rules import RULES, Rule, files
from lopt.rules.star import Star

SHAPES = {"w": (30, 50), "b": (7,), "s": ()}
REFUSED = {"star"} | {name for name, rule in RULES.items() if rule.has("finish") or rule.has("delegate")}
ROUNDING = 1e-5  # the same formula in another order of operations, fp32
STAGED = ["lstm", "small_fc", "hierarchical_rnn"]  # elementwise, with sums and lines, with rows


def draw(seed: int, scale: float = 1.0) -> Params:
    """Tensors whose rows differ in scale by powers of ten."""
    generator = make_generator(seed)
    result = {}
    for name, shape in SHAPES.items():
        x = torch.randn(shape, generator=generator)
        rows = 10 ** (2 * torch.rand(x.shape[:-1], generator=generator) - 1)
        result[name] = scale * x * (rows[..., None] if x.ndim else rows)
    return result


def move(rule: Rule, grads: list[Params]) -> list[Params]:
    """The steps that the rule makes."""
    params = draw(0)
    state, deltas = rule.init_state(params), []
    with torch.no_grad():
        for g in grads:
            new, state = rule.update(g, params, state, torch.ones(()), torch.tensor(50))
            deltas.append({name: new[name] - p for name, p in params.items()})
            params = new
    return deltas


def assert_close(actual: Tensor, expected: Tensor, size: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING * size)


def largest(params: Params) -> float:
    return max(float(p.abs().max()) for p in params.values())


@pytest.mark.parametrize("inner", STAGED)
def test_without_residual_and_decay_it_is_adam_step_by_step(inner: str) -> None:
    star = Star(inner, lr=0.05, residual_scale=0.0, weight_decay=0.0, momentum_decays=(0.8,), second_decay=0.95)
    grads = [draw(step) for step in range(1, 31)]
    size = largest(draw(0))  # a step is the difference of two rounded parameters
    for ours, theirs in zip(move(star, grads), move(RULES["adam"](0.05, 0.8, 0.95), grads), strict=True):
        for name, delta in theirs.items():
            assert_close(ours[name], delta, size)


def test_nominal_term_is_the_mean_of_adam_over_the_momenta() -> None:
    decays = (0.5, 0.9, 0.99)
    star = Star(lr=0.05, residual_scale=0.0, weight_decay=0.0, momentum_decays=decays)
    grads = [draw(step) for step in range(1, 6)]
    adams = [move(RULES["adam"](0.05, decay), grads)[-1] for decay in decays]
    for name, delta in move(star, grads)[-1].items():
        assert_close(delta, torch.stack([adam[name] for adam in adams]).mean(0), largest(draw(0)))


def test_weight_decay_shrinks_parameters_whatever_the_learning_rate() -> None:
    star = Star(lr=0.0, residual_scale=0.0, weight_decay=0.25)
    for name, delta in move(star, [draw(1)])[0].items():
        assert_close(delta, -0.25 * draw(0)[name], largest(draw(0)))


@pytest.mark.parametrize("inner", STAGED)
def test_first_step_is_the_nominal_one_plus_the_squashed_inner_one(inner: str) -> None:
    star = Star(inner, lr=1e-3, residual_scale=0.5, residual_unit=0.002, weight_decay=0.0)
    (ours,), (alone,) = move(star, [draw(1)]), move(star.inner, [draw(1)])
    for name, g in draw(1).items():
        assert_close(ours[name], 0.5 * torch.tanh(alone[name] / 0.002) - 1e-3 * g.sign(), largest(draw(0)))


@pytest.mark.parametrize("inner", ["small_fc", "hierarchical_rnn"])
def test_inner_rule_remembers_what_it_would_alone(inner: str) -> None:
    star = Star(inner, lr=0.0, residual_scale=0.0, weight_decay=0.0)
    alone, params = star.inner, draw(0)
    state, own = star.init_state(params), alone.init_state(params)
    for step in range(1, 4):
        _, state = star.update(draw(step), params, state)
        _, own = alone.update(draw(step), params, own)
    for name, acc in own.accumulators.items():
        assert all(torch.equal(state.accumulators[name][key], value) for key, value in acc.items())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e10])
def test_residual_is_bounded_whatever_the_scale_of_gradient_and_inner_step(scale: float) -> None:
    star = Star("lstm", lr=0.0, residual_scale=0.125, residual_unit=1e-12, weight_decay=0.0)
    for delta in move(star, [draw(step, scale) for step in range(1, 9)]):
        assert 0.1 < largest(delta) <= 0.125 + ROUNDING * largest(draw(0))


def test_residual_vanishes_with_the_gradient() -> None:
    star = Star("lstm", lr=0.0, residual_scale=0.125, residual_unit=1e-12, weight_decay=0.0)
    none = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    deltas = move(star, [draw(1)] + [none] * 100)
    assert min(float(delta.abs().min()) for delta in deltas[0].values()) > 0.12
    assert 0 < largest(deltas[-1]) < 0.02 * 0.125  # recent: 0.9^100 of the first square
    assert largest(move(star, [none])[0]) < 1e-6


@pytest.mark.parametrize("inner", STAGED)
def test_optimizer_steps_as_update_chunk_by_chunk(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_WITH_TEMPORARIES", 1)
    star = Star(inner)
    assert star.elementwise == (inner == "lstm")
    params = {name: nn.Parameter(p) for name, p in draw(0).items()}
    optimizer = LearnedOptimizer(params.values(), star)
    grads = [draw(step) for step in range(1, 4)]
    for g in grads:
        for name, p in params.items():
            p.grad = g[name]
        optimizer.step(loss=1.0)
    deltas = move(star, grads)
    for name, p in params.items():
        moved = torch.stack([delta[name] for delta in deltas]).sum(0)
        assert_close(p.detach() - draw(0)[name], moved, float(draw(0)[name].abs().max()))


@pytest.mark.parametrize("name", sorted(set(RULES) - REFUSED))
def test_wrapper_takes_on_what_the_inner_rule_needs(name: str) -> None:
    star = Star(name)
    flags = ("elementwise", "needs_loss", "needs_num_steps", "open_ended", "tensor_keys", "feature_names")
    assert [getattr(star, flag) for flag in flags] == [getattr(star.inner, flag) for flag in flags]
    assert star.temporaries > star.inner.temporaries
    acc, own = (rule.init_state(draw(0)).accumulators["w"] for rule in (star, star.inner))
    assert len(acc) == len(own) + 3
    assert all(bool(delta.isfinite().all()) for delta in move(star, [draw(1), draw(2)])[-1].values())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_rules_whose_step_is_no_sum_of_elements_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"star cannot wrap '{name}'"):
        Star(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "smal_fc"}, "no such rule. Did you mean small_fc"),
        ({"inner_config": {"hiden": 3}}, "inner_config {'hiden': 3}.*hiden"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"residual_unit": 0.0}, "residual_unit must be above 0, got 0.0"),
        ({"momentum_decays": (0.9, 1.0)}, "decays must be above 0 and below 1"),
        ({"momentum_decays": ()}, "at least one"),
    ],
    ids=str,
)
def test_options_that_make_no_rule_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Star(**options)


def test_file_rebuilds_the_inner_rule_with_the_options_it_was_made_with(tmp_path: Path) -> None:
    star = Star("lstm", {"hidden": 3}, momentum_decays=(0.9,))
    assert json.loads(json.dumps(star.config))["inner_config"] == RULES["lstm"](hidden=3).config
    read = files.load(files.save(star, tmp_path / "rule.safetensors"))
    (ours,), (theirs,) = move(star, [draw(1)]), move(read, [draw(1)])
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)
