"""The hierarchical RNN: equal to the source's order of operations, and what its levels may tell each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.optim.torch_backend import chunked
from lopt.rules import RULES, Rule

SHAPES = {"w": (40, 60), "b": (5,)}
ROUNDING = 1e-5  # the same formula in another order of operations, fp32, over a few steps


def make_rule(scale: float = 0.1) -> Rule:
    """A rule whose rates change, as those of an untrained one do not."""
    rule, generator = RULES["hierarchical_rnn"](), make_generator(5)
    with torch.no_grad():
        for weight in rule.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return rule


def draw(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Params:
    """Tensors whose rows differ in scale by powers of ten."""
    generator = make_generator(seed)
    result = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        result[name] = x * (10 ** (2 * torch.rand(x.shape[:-1], generator=generator) - 1))[..., None]
    return result


def move(rule: Rule, params: Params, grads: list[Params]) -> Params:
    """Where the rule takes the parameters."""
    state = rule.init_state(params)
    with torch.no_grad():
        for g in grads:
            params, state = rule.update(g, params, state)
    return params


def assert_close(actual: Tensor, expected: Tensor, size: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING * size)


def follow_source(w: Params, params: Params, grads: list[Params], scales: int = 4) -> Params:
    """The published code, one row per element; a level above steps at the end of the step."""

    def cell(level: int, x: Tensor, h: Tensor, bias: Tensor | float) -> Tensor:
        size, kernel = h.shape[-1], torch.cat([w[f"w_x{level}"], w[f"w_h{level}"]], 1)
        gates = torch.cat([x, h], -1) @ kernel[: 2 * size].T + (w[f"b{level}"] + bias)[: 2 * size]
        r, u = torch.sigmoid(gates).split(size, -1)
        c = torch.tanh(torch.cat([x, r * h], -1) @ kernel[2 * size :].T + (w[f"b{level}"] + bias)[2 * size :])
        return u * h + (1 - u) * c

    params = dict(params)
    whole, layers = w["start3"], dict.fromkeys(params, w["start2"])
    hidden = {name: w["start1"].expand(p.numel(), -1) for name, p in params.items()}
    decays = {name: torch.zeros(p.numel(), 2) for name, p in params.items()}
    log_lr = {name: w["log_lr"].expand(p.numel()) for name, p in params.items()}
    m, v = ({name: [torch.zeros(p.numel())] * scales for name, p in params.items()} for _ in range(2))
    for g in grads:
        mean_log_lr = torch.cat(list(log_lr.values())).mean()
        for name in params:
            flat = g[name].reshape(-1)
            decay, scale_decay = decays[name].T
            m[name] = [torch.lerp(flat, old, decay**0.5**i) for i, old in enumerate(m[name])]
            squares = zip(m[name], v[name], strict=True)
            v[name] = [(1 - scale_decay) * (new**2 + 1e-12) + scale_decay * old for new, old in squares]
            scaled = [torch.asinh(a / torch.sqrt(b + 1e-16)) for a, b in zip(m[name], v[name], strict=True)]
            logs = torch.stack([torch.log(b + 1e-16) for b in v[name]])
            products = [a * b for a, b in pairwise(scaled)]
            x = torch.stack([*scaled, *products, *(logs - logs.mean(0)), log_lr[name] - mean_log_lr], -1)
            h = cell(1, x, hidden[name], w["w_2to1"] @ layers[name] + w["w_3to1"] @ whole)
            layers[name] = cell(2, torch.cat([h, x], -1).mean(0), layers[name], w["w_3to2"] @ whole)
            d = h @ w["w_direction"][0] + torch.stack(scaled, -1) @ w["w_shortcut"][0]
            step_log_lr = log_lr[name] + h @ w["w_rate"][0] + w["b_rate"]
            params[name] = params[name] - (step_log_lr.exp() * d / d.square().mean().sqrt()).view(params[name].shape)
            log_lr[name] = torch.lerp(step_log_lr, log_lr[name], torch.sigmoid(w["rate_momentum"]))
            hidden[name], decays[name] = h, torch.sigmoid(h @ w["w_decays"].T + w["b_decays"])
        whole = cell(3, torch.stack(list(layers.values())).mean(0), whole, 0.0)
    return params


def test_steps_are_those_of_the_source() -> None:
    rule, shapes = make_rule(), {"w": (3, 4), "b": (5,)}
    params = {name: torch.zeros(shape) for name, shape in shapes.items()}
    grads = [draw(step, shapes) for step in range(1, 7)]
    weights = {name: weight.detach() for name, weight in rule.named_parameters()}
    expected = follow_source(weights, params, grads)
    for name, p in move(rule, params, grads).items():
        assert_close(p, expected[name], float(expected[name].abs().max()))


@pytest.mark.parametrize("order", [["b", "w", "e"], ["e", "b", "w"]], ids=str)
def test_neither_order_nor_empty_tensors_matter(order: list[str]) -> None:
    rule, shapes = make_rule(), SHAPES | {"e": (0, 3)}
    expected = move(rule, draw(0), [draw(step) for step in range(1, 6)])
    params, *grads = ({name: draw(step, shapes)[name] for name in order} for step in range(6))
    found = move(rule, params, grads)
    for name, p in expected.items():
        assert_close(found[name], p, float(p.abs().max()))


def test_tensors_hear_of_each_other_through_the_model_only() -> None:
    rule = make_rule()
    params = draw(0)
    grads = [draw(step) for step in range(1, 5)]
    others = [g | {"b": -100 * g["b"]} for g in grads]
    assert not torch.equal(move(rule, params, grads)["w"], move(rule, params, others)["w"])
    assert torch.equal(move(rule, params, grads[:1])["w"], move(rule, params, others[:1])["w"])
    with torch.no_grad():
        for name in ("w_3to1", "w_3to2", "w_rate"):  # the last: rates are told against their mean over the model
            getattr(rule, name).zero_()
    assert torch.equal(move(rule, params, grads)["w"], move(rule, params, others)["w"])


def test_scale_of_the_gradient_does_not_matter() -> None:
    rule, params = make_rule(), draw(0)
    grads = [draw(step) for step in range(1, 6)]
    larger = [{name: 1000 * g for name, g in step.items()} for step in grads]
    found, expected = move(rule, params, larger), move(rule, params, grads)
    for name, p in params.items():
        assert_close(found[name] - p, expected[name] - p, float(p.abs().max()))


def test_optimizer_steps_as_update_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_WITH_TEMPORARIES", 1)
    rule, grads = make_rule(), [draw(step) for step in range(1, 6)]
    params = {name: nn.Parameter(p) for name, p in draw(0).items()}
    optimizer = LearnedOptimizer(params.values(), rule)
    for g in grads:
        for name, p in params.items():
            p.grad = g[name]
        optimizer.step()
    for name, p in move(rule, draw(0), grads).items():
        assert_close(params[name].detach() - draw(0)[name], p - draw(0)[name], float(p.abs().max()))


def test_parameter_that_joins_late_starts_afresh_and_is_not_heard_at_once() -> None:
    rule, grads = RULES["hierarchical_rnn"](), [draw(step) for step in range(1, 5)]
    alone, late = nn.Parameter(draw(0)["w"]), nn.Parameter(draw(0)["w"])
    joining = nn.Parameter(draw(0)["b"])
    optimizers = [LearnedOptimizer([alone], rule), LearnedOptimizer([late, joining], rule)]
    for step, g in enumerate(grads):
        alone.grad, late.grad = g["w"].clone(), g["w"].clone()
        joining.grad = g["b"].clone() if step >= 2 else None
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(alone, late) == (step < 3)
        if step == 2:
            states = [optimizer.state[p] for optimizer, p in zip(optimizers[1:] * 2, (late, joining), strict=True)]
            assert torch.equal(states[1]["tensor"], rule.start2)
            assert torch.equal(states[1]["global"], states[0]["global"])


def test_rate_beyond_its_limit_is_held_and_still_has_a_gradient() -> None:
    rule = RULES["hierarchical_rnn"]()
    rule.log_lr.data.fill_(100.0)
    params = {"w": torch.zeros(3)}
    new, _ = rule.update({"w": torch.ones(3)}, params, rule.init_state(params))
    assert 1e14 < float(new["w"].detach().abs().max()) < 1e15  # exp(33)
    (gradient,) = torch.autograd.grad(new["w"].sum(), rule.log_lr)
    assert bool(gradient.isfinite())
    assert float(gradient) != 0


def test_a_little_meta_training_makes_quadratics_converge_faster() -> None:
    rule = RULES["hierarchical_rnn"](hidden=6, tensor_hidden=6, global_hidden=6, lr=1e-2)
    outer, curvature = torch.optim.Adam(rule.parameters(), 0.02), torch.logspace(-1, 1, 8)

    def run(seed: int) -> Tensor:
        params = {"w": torch.randn(16, 8, generator=make_generator(seed))}
        state, losses = rule.init_state(params, 1), []
        for _ in range(15):
            params, state = rule.update({"w": (curvature * params["w"]).detach()}, params, state)
            losses.append((curvature * params["w"].square()).sum(-1).mean())
        return torch.stack(losses).mean()

    before = float(run(1000).detach())
    for seed in range(40):
        outer.zero_grad()
        run(seed).log().backward()
        outer.step()
    assert float(run(1000).detach()) < 0.5 * before


@pytest.mark.parametrize("option", ["hidden", "tensor_hidden", "global_hidden", "num_scales", "lr"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_out_of_range_are_refused_by_name(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        RULES["hierarchical_rnn"](**{option: value})


def test_sizes_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ValueError, match="from 1 to 1024, got 100000"):
        RULES["hierarchical_rnn"](global_hidden=100_000)
