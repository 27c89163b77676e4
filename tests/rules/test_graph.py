"""The graph rule: small_fc until it is trained; then what a tensor does depends on its neighbours and on its place."""

from __future__ import annotations

import pytest
import torch

import lopt
from lopt.core.tensors import Params
from lopt.rules import RULES, Rule
from lopt.rules.stages import PLACE

SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (4, 4), "10.weight": (2, 4), "10.bias": (2,)}


def draw(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    # Scales that differ from tensor to tensor: equal ones would hide whom a tensor hears.
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32) * 2.0**-i
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def make_rule(rounds: int = 1, talks: bool = True) -> Rule:
    rule = RULES["graph"](hidden=4, width=6, rounds=rounds, step_mult=0.1)
    if talks:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            said: torch.Tensor = rule.w_say  # type: ignore[assignment]
            said.copy_(torch.randn(said.shape, generator=generator, dtype=torch.float32) / 3)
    return rule


@torch.no_grad()
def step(rule: Rule, grads: Params, params: Params) -> Params:
    return rule.update(grads, params, rule.init_state(params))[0]


def test_it_is_small_fc_until_it_is_trained() -> None:
    small = RULES["small_fc"](hidden=4, step_mult=0.1)
    expected, found = (step(rule, draw(1), draw(0)) for rule in (small, make_rule(talks=False)))
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(("rounds", "heard"), [(0, 0), (1, 1), (2, 2)])
def test_a_tensor_hears_of_those_that_are_as_many_places_away_as_there_are_rounds(rounds: int, heard: int) -> None:
    rule, params, grads = make_rule(rounds), draw(0), draw(1)
    names, distances = list(SHAPES), set()
    for changed in range(len(names)):
        # Another parameter of the same size: its gradient, and with it the mean of all, stays.
        other = params | {names[changed]: 3 * params[names[changed]]}
        before, after = step(rule, grads, params), step(rule, grads, other)
        for i, name in enumerate(names):
            if i != changed and not torch.equal(before[name], after[name]):
                distances.add(abs(i - changed))
    assert distances == set(range(1, heard + 1))


def test_the_order_of_the_model_counts_and_not_that_of_the_names() -> None:
    rule, params, grads = make_rule(), draw(0), draw(1)
    turned = {name: params[name] for name in reversed(SHAPES)}
    forth, back = step(rule, grads, params), step(rule, grads, turned)
    assert any(not torch.equal(forth[name], back[name]) for name in SHAPES)


def test_the_optimizer_keeps_the_order_though_it_steps_by_names_and_in_stacks() -> None:
    rule, params = make_rule(2), draw(0)
    own = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    # Equal shapes that are no neighbours are stepped as one tensor.
    own["last"] = torch.nn.Parameter(own["2.weight"].detach() * 2)
    params = {name: p.detach().clone() for name, p in own.items()}
    optimizer = lopt.LearnedOptimizer(own.items(), rule)
    state = rule.init_state(params)
    for seed in (1, 2, 3):
        grads = draw(seed) | {"last": draw(seed)["2.weight"] * 0.1}
        for name, p in own.items():
            p.grad = grads[name]
        optimizer.step()
        with torch.no_grad():
            params, state = rule.update(grads, params, state)
    for name, p in own.items():
        torch.testing.assert_close(p.detach(), params[name])
    assert [int(optimizer.state[p][PLACE]) for p in own.values()] == [0, 1, 2, 3, 4, 5]
    # A state that is loaded into another optimizer brings the places along.
    fresh = {name: torch.nn.Parameter(p.detach().clone()) for name, p in own.items()}
    other = lopt.LearnedOptimizer(fresh.items(), rule)
    other.load_state_dict(optimizer.state_dict())
    assert [int(other.state[p][PLACE]) for p in fresh.values()] == [0, 1, 2, 3, 4, 5]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be from 1 to 256, got 0"):
        RULES["graph"](width=0)
    with pytest.raises(ValueError, match=r"rounds must be from 0 to 8, got 9"):
        RULES["graph"](rounds=9)
