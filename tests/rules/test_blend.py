"""Blend: sizes and directions of its steps, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.horizons import LogUniform
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.meta.unroll.whole_runs import run_to_end
from lopt.rules.blend import FEATURES, Blend
from lopt.tasks import TASKS

STEPS = 10
Run = list[dict[str, Tensor]]


def draw(seed: int) -> Params:
    generator = make_generator(seed)
    return {"w": torch.randn(4, 6, generator=generator), "b": torch.randn(5, generator=generator)}


def silence(rule: Blend, **outputs: float) -> Blend:
    """A controller that says the same, whatever it sees."""
    with torch.no_grad():
        rule.w_out.zero_()
        for i, key in enumerate(("strength", "orthogonal", "fast", "adapt")):
            rule.b_out[i] = outputs.get(key, 0.0)
    return rule


def run(rule: Blend, params: Params, scale: float = 1.0) -> tuple[Run, list[Params]]:
    """The steps that the rule makes on gradients that do not depend on the parameters, and these."""
    state, moves, seen = rule.init_state(params), [], []
    with torch.no_grad():
        for step in range(STEPS):
            grads = {name: scale * g for name, g in draw(10 + step).items()}
            new, state = rule.update(grads, params, state, torch.tensor(1.0), torch.tensor(STEPS))
            moves.append({name: new[name] - p for name, p in params.items()})
            seen.append(grads)
            params = new
    return moves, seen


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_size_is_relative_to_the_initial_parameters_and_falls_to_nothing() -> None:
    params = {name: 3 * p for name, p in draw(0).items()}
    moves, _ = run(silence(Blend(lr=0.1), orthogonal=-30.0, strength=0.5), params)
    for step, move in enumerate(moves):
        for name, p in params.items():
            expected = 0.1 * rms(p) * (1 - step / STEPS) * float(torch.tensor(0.5).exp())
            assert rms(move[name]) == pytest.approx(expected, rel=1e-4)


def test_without_preconditioner_it_follows_the_momentum_and_with_it_adam() -> None:
    params = draw(0)
    rule = silence(Blend(), orthogonal=-30.0, fast=30.0, adapt=-30.0)
    moves, grads = run(rule, params)
    m, v, adam = torch.zeros(5), torch.zeros(5), silence(Blend(), orthogonal=-30.0, fast=30.0, adapt=30.0)
    steered, _ = run(adam, params)
    for move, by_adam, g in zip(moves, steered, grads, strict=True):
        m, v = 0.9 * m + 0.1 * g["b"], 0.99 * v + 0.01 * g["b"].square()
        for found, wanted in ((move["b"], -m), (by_adam["b"], -m / v.sqrt())):
            torch.testing.assert_close(found / rms(found), wanted / rms(wanted), rtol=1e-3, atol=1e-3)


def test_orthogonalised_steps_have_singular_values_of_one_size() -> None:
    plain, _ = run(silence(Blend(), orthogonal=-30.0), draw(0))
    straight, _ = run(silence(Blend(), orthogonal=30.0), draw(0))
    spreads = []
    for moves in (plain, straight):
        values = torch.linalg.svdvals(moves[0]["w"])
        spreads.append(float(values.max() / values.min()))
    assert spreads[1] < 2 < spreads[0]  # five Newton-Schulz steps leave them between 0.7 and 1.2


def test_scale_of_the_loss_does_not_matter() -> None:
    (moves, _), (others, _) = (run(Blend(), draw(0), scale) for scale in (1.0, 1e4))
    for move, other in zip(moves, others, strict=True):
        for name in move:
            torch.testing.assert_close(move[name], other[name], rtol=1e-3, atol=1e-6)


def test_features_have_names_and_each_reaches_the_output() -> None:
    rule = Blend()
    assert rule.w_in.shape[1] == rule.w_bypass.shape[1] == len(FEATURES) == len(rule.feature_names)
    state, params = rule.init_state(draw(0)), draw(0)
    for step, loss in enumerate((3.0, 2.0, 2.5, 1.0, 1.5)):
        params, state = rule.update(draw(10 + step), params, state, torch.tensor(loss), torch.tensor(STEPS))
    (slopes,) = torch.autograd.grad(sum(p.sum() for p in params.values()), [rule.w_bypass])
    assert bool((slopes[0] != 0).all())


@pytest.mark.parametrize("options", [{"hidden": 0}, {"hidden": 10_000}, {"lr": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Blend(**options)  # type: ignore[arg-type]


# -- what it is trained with -------------------------------------------------------------------------------------------


def start(horizon: LogUniform, ids: list[int], episode: int) -> Slots:
    loop = InnerLoop(Blend(), TASKS["quadratic"](), 0, horizon)
    return loop.restart(torch.tensor(ids), torch.full((len(ids),), episode))


def test_shared_horizons_are_equal_in_all_slots_and_differ_between_turns() -> None:
    shared = LogUniform(50, 2000, shared=True)
    drawn = [start(shared, ids, turn).horizon for turn in range(4) for ids in ([0, 1, 2], [7, 9, 11])]
    assert all(len(set(horizon.tolist())) == 1 for horizon in drawn)
    turns = [int(horizon[0]) for horizon in drawn]
    assert turns[::2] == turns[1::2]
    assert len(set(turns)) == 4
    own = start(LogUniform(50, 2000), [0, 1, 2], 0).horizon
    assert len(set(own.tolist())) == 3


def test_log_final_is_the_log_of_the_last_loss_over_the_first() -> None:
    loop = InnerLoop(Blend(), TASKS["quadratic"](), 0, LogUniform(7, 7))
    estimator = ESTIMATORS["full_es"](sigma=1e-9, objective="log_final")
    carry = estimator.start(loop, torch.arange(3))
    with torch.no_grad():
        window = run_to_end(loop, carry.slots)
    expected = (window.losses[-1] / carry.slots.first_loss).log().mean()
    found = estimator.estimate(loop, carry).metrics["objective"]
    assert found == pytest.approx(float(expected), rel=1e-5)
