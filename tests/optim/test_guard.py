"""The guard: who steps when, how the steps are bounded, and what it saves (acceptance: `pytest -m slow`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lopt
from lopt.core.random import derive_seeds, draw_indices, draw_uniform
from lopt.optim.guard.decisions import Guard, GuardOptions
from lopt.optim.guard.state import GuardState
from lopt.optim.guard.steps import guard_step, init_guard, restore_snapshot, save_snapshot
from lopt.rules import Rule
from lopt.tasks.data.splits import load_digits

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-3
World = Callable[[int, float], float]


def noise(count: int, seed: int = 0) -> list[float]:
    """Numbers between -1 and 1."""
    return (2 * draw_uniform(derive_seeds(seed, "noise"), count) - 1).tolist()


def run_world(
    guard: Guard, rate: World, steps: int, loss: float = 2.0, noisy: float = 0.01, seed: int = 0
) -> list[float]:
    """Shares over a run whose loss shrinks by `rate(step, share)` per step; a restored snapshot restores the loss."""
    shares, snapshot, jitter = [], loss, noise(steps, seed)
    for step in range(steps):
        guard.observe(loss * (1 + noisy * jitter[step]))
        shares.append(guard.share)
        if guard.save:
            snapshot = loss
        loss = snapshot if guard.restore else loss * (1 - rate(step, guard.share))
    return shares


# -- who steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip", 0.5), ("rise_steps", 0), ("window", 3), ("max_window", 8), ("rise", float("nan")), ("cooldown", 1.5)],
)
def test_option_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GuardOptions(**{name: value})


def test_without_a_loss_the_rule_steps_alone() -> None:
    guard = Guard()
    for _ in range(500):
        guard.observe(None)
        assert (guard.share, guard.save, guard.restore) == (1.0, False, False)


def test_a_falling_loss_is_left_to_the_rule() -> None:
    guard = Guard()
    assert set(run_world(guard, lambda *_: 0.02, 230)) == {1.0}
    assert guard.now.fallbacks == 0


def test_the_first_loss_takes_a_snapshot() -> None:
    guard = Guard()
    guard.observe(2.0)
    assert guard.save
    guard.observe(2.0)
    assert not guard.save


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_a_loss_beyond_repair_is_undone_at_once(bad: float) -> None:
    guard = Guard()
    guard.observe(2.0)
    guard.observe(bad)
    assert (guard.share, guard.restore, guard.save, guard.now.failures) == (0.0, True, False, 1)
    guard.observe(2.0)
    assert (guard.share, guard.restore) == (0.0, False)


def test_non_finite_first_loss_has_no_snapshot_to_restore() -> None:
    guard = Guard()
    guard.observe(float("nan"))
    assert (guard.share, guard.restore) == (0.0, False)


def test_a_raised_loss_is_a_failure_after_rise_steps_in_a_row() -> None:
    guard = Guard(GuardOptions(rise_steps=4))
    for loss in [2.0, 2.9, 2.9, 2.0, 3.3, 3.3, 3.3]:
        guard.observe(loss)
        assert guard.share == 1.0
    guard.observe(3.3)
    assert (guard.share, guard.restore) == (0.0, True)


def test_adamw_takes_over_a_plateau_on_which_it_is_better() -> None:
    shares = [run_world(Guard(), lambda _, share: 0.0 if share else 0.01, 200, seed=seed) for seed in range(20)]
    assert all(run[:15] == [1.0] * 15 for run in shares)
    assert sum(sum(run) for run in shares) < 0.2 * 20 * 200  # a window passes by chance now and then


def test_the_rule_is_back_after_one_window_where_adamw_is_worse() -> None:
    guard = Guard()
    shares = run_world(guard, lambda step, share: 0.01 * share * (step < 100 or step > 250), 1500)
    assert guard.now.fallbacks >= 1
    assert guard.now.failures == 0
    assert shares[-100:] == [1.0] * 100


def test_the_rule_returns_when_it_has_become_better() -> None:
    guard = Guard()
    shares = run_world(guard, lambda step, share: (0.01 if step > 150 else 0.0) if share else 0.003, 600)
    assert guard.now.returns >= 1
    assert shares[-100:] == [1.0] * 100


def test_turns_of_adamw_double_when_the_rule_fails_again() -> None:
    shares = run_world(Guard(), lambda _, share: -0.3 if share else 0.001, 3000)
    turns, count = [], 0
    for share in shares:
        if share and count:
            turns.append(count)
        count = 0 if share else count + 1
    assert len(turns) >= 3
    for first, second in pairwise(turns):
        assert 1.9 < second / first < 2.1


def test_a_long_run_of_a_slow_rule_goes_to_adamw() -> None:
    shares = run_world(Guard(), lambda _, share: 0.0005 if share else 0.003, 2000, noisy=0.001)
    assert sum(shares[-1000:]) < 200


def test_no_probation_begins_near_the_planned_end() -> None:
    for num_steps in range(250, 1200, 50):
        guard = Guard(num_steps=num_steps)
        shares = run_world(guard, lambda _, share: -0.3 if share else 0.001, num_steps)
        assert not any(shares[-200:])


def test_state_and_load_go_on_bitwise() -> None:
    def rate(step: int, share: float) -> float:
        return 0.005 * (1 - step / 300) if share else 0.002

    for cut in range(0, 900, 37):
        guard, jitter, loss = Guard(), noise(1000), 2.0
        twin = None
        for step in range(1000):
            if step == cut:
                twin = Guard()
                twin.now = GuardState.from_numbers(guard.now.to_numbers())
            value = loss * (1 + 0.02 * jitter[step])
            guard.observe(value)
            if twin is not None:
                twin.observe(value)
                assert twin.now.to_numbers() == guard.now.to_numbers() or cut == 0
                assert (twin.share, twin.save, twin.restore) == (guard.share, guard.save, guard.restore)
            loss *= 1 - rate(step, guard.share)


def test_state_is_plain_numbers_and_another_length_is_refused() -> None:
    guard = Guard()
    guard.observe(1.0)
    assert all(type(value) is float for value in guard.now.to_numbers())
    with pytest.raises(ValueError, match="numbers"):
        GuardState.from_numbers(guard.now.to_numbers()[:-1])


# -- the steps ---------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different size in every row."""
    count = torch.Size(shape).numel()
    x = torch.tensor(noise(max(count, 1), seed))[:count].reshape(shape).float()
    return x * 10.0 ** torch.arange(-2, shape[0] - 2).view(-1, *[1] * (len(shape) - 1)) if shape else x


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 3, 4)])
def test_share_zero_is_adamw(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(draw(*shape))
    optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=0.0)
    own, state = p.detach().clone(), init_guard(p)
    for step in range(5):
        g = draw(*shape, seed=step + 1)
        p.grad = g
        optimizer.step()
        delta, state, _ = guard_step(
            torch.ones_like(g), g, state, torch.tensor(step), 0.0, LR, BETAS, EPS, GuardOptions()
        )
        own += delta
    torch.testing.assert_close(own, p.detach(), rtol=1e-5, atol=1e-7)  # steps are 1e-3: one rounding of p each


def test_share_one_leaves_a_step_of_usual_length_bitwise_and_the_moments_warm() -> None:
    g, delta = draw(4, 3), draw(4, 3, seed=1) * 1e-4
    state = init_guard(g)
    new_delta, new, clipped = guard_step(delta, g, state, torch.tensor(0), 1.0, LR, BETAS, EPS, GuardOptions())
    assert torch.equal(new_delta, delta)
    assert int(clipped) == 0
    torch.testing.assert_close(new["guard_m"], 0.1 * g)
    torch.testing.assert_close(new["guard_v"], 0.001 * g * g)
    assert not state["guard_m"].any()  # pure


def test_share_between_is_the_blend() -> None:
    g, delta = draw(4, 3), draw(4, 3, seed=1) * 1e-4
    args = (torch.tensor(0), LR, BETAS, EPS, GuardOptions())
    parts = [guard_step(delta, g, init_guard(g), args[0], share, *args[1:])[0] for share in (0.0, 1.0)]
    for share in (0.25, torch.tensor(0.25)):
        blend = guard_step(delta, g, init_guard(g), args[0], share, *args[1:])[0]
        torch.testing.assert_close(blend, 0.75 * parts[0] + 0.25 * parts[1])


def test_the_first_step_cannot_define_the_running_norm() -> None:
    g, options = draw(10, 10), GuardOptions()
    delta, _, clipped = guard_step(g * 1e6, g, init_guard(g), torch.tensor(0), 1.0, LR, BETAS, EPS, options)
    assert int(clipped) == 1
    torch.testing.assert_close(float(delta.norm()), options.clip * options.seed_norm * LR * 10, rtol=1e-5, atol=0)


def test_an_outlier_is_clipped_to_a_multiple_of_the_running_norm() -> None:
    g, state, options = draw(8), init_guard(draw(8)), GuardOptions()
    usual = torch.full((8,), 0.02)
    for step in range(200):
        _, state, clipped = guard_step(usual, g, state, torch.tensor(step), 1.0, LR, BETAS, EPS, options)
        assert int(clipped) == 0
    delta, _, clipped = guard_step(usual * 100, g, state, torch.tensor(200), 1.0, LR, BETAS, EPS, options)
    assert int(clipped) == 1
    torch.testing.assert_close(delta, usual * options.clip, rtol=1e-3, atol=0)


def test_rule_without_loss_cannot_grow_its_steps_fast() -> None:
    g, state, options = draw(8), init_guard(draw(8)), GuardOptions()
    for step in range(10):
        huge = torch.full((8,), 10.0**step)
        delta, state, _ = guard_step(huge, g, state, torch.tensor(step), 1.0, LR, BETAS, EPS, options)
    assert float(delta.abs().max()) < 2 * options.clip * options.seed_norm * LR


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_step_without_finite_norm_is_dropped_and_counted(bad: float) -> None:
    g = draw(6)
    delta = torch.full((6,), 1e-3)
    delta[2] = bad
    step, state, clipped = guard_step(delta, g, init_guard(g), torch.tensor(0), 1.0, LR, BETAS, EPS, GuardOptions())
    assert not step.any()
    assert int(clipped) == 1
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize("share", [1.0, 0.0, 0.5, "tensor"])
def test_many_equal_tensors_are_as_one_by_one(share: float | str) -> None:
    k, options = 3, GuardOptions()
    shares = torch.tensor([0.0, 1.0, 0.3]) if share == "tensor" else share
    together = init_guard(draw(k, 4, 5), 1)
    alone = [init_guard(draw(k, 4, 5)[i]) for i in range(k)]
    steps = torch.tensor([0, 3, 50])
    for t in range(4):
        g, delta = draw(k, 4, 5, seed=t), draw(k, 4, 5, seed=t + 10)
        out, together, clipped = guard_step(delta, g, together, steps + t, shares, LR, BETAS, EPS, options)
        total = 0
        for i in range(k):
            own = shares[i] if isinstance(shares, Tensor) else shares
            one, alone[i], count = guard_step(delta[i], g[i], alone[i], steps[i] + t, own, LR, BETAS, EPS, options)
            total += int(count)
            torch.testing.assert_close(out[i], one)
            for name, value in alone[i].items():
                torch.testing.assert_close(together[name][i], value)
        assert total == int(clipped) > 0


def test_shards_are_clipped_as_the_whole() -> None:
    g, delta, options = draw(6, 4), draw(6, 4, seed=1), GuardOptions()
    args = (torch.tensor(0), 0.5, LR, BETAS, EPS, options)
    whole, _, _ = guard_step(delta, g, init_guard(g), *args)
    squares = [torch.stack([delta[rows].square().sum(), torch.tensor(12.0)]) for rows in (slice(3), slice(3, 6))]
    for rows in (slice(3), slice(3, 6)):
        part, _, clipped = guard_step(
            delta[rows], g[rows], init_guard(g[rows]), *args, reduce=lambda _: squares[0] + squares[1]
        )
        torch.testing.assert_close(part, whole[rows])
        assert int(clipped) == 1


def test_restore_brings_the_snapshot_and_fresh_moments() -> None:
    p, state = draw(3, 2), init_guard(draw(3, 2))
    kept = p + 1
    save_snapshot(kept, state)
    g = draw(3, 2, seed=1)
    _, state, _ = guard_step(g * 1e6, g * 1e6, state, torch.tensor(0), 1.0, LR, BETAS, EPS, GuardOptions())
    restore_snapshot(p, state, torch.tensor(1))
    assert torch.equal(p, kept)
    delta, _, _ = guard_step(g, g, state, torch.tensor(1), 0.0, LR, BETAS, EPS, GuardOptions())
    fresh, _, _ = guard_step(g, g, init_guard(p), torch.tensor(0), 0.0, LR, BETAS, EPS, GuardOptions())
    assert torch.equal(delta, fresh)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_in_place_is_the_same_to_the_bit(share: float) -> None:
    g, delta = draw(4, 3), draw(4, 3, seed=1)
    state = init_guard(draw(4, 3, seed=2))
    results = []
    for in_place in (False, True):
        own = {key: value.clone() for key, value in state.items()}
        results.append(
            guard_step(delta.clone(), g, own, torch.tensor(0), share, LR, BETAS, EPS, GuardOptions(), in_place=in_place)
        )
    (a, first, _), (b, second, _) = results
    assert torch.equal(a, b)
    assert all(torch.equal(first[key], second[key]) for key in state)


# -- what it saves -----------------------------------------------------------------------------------------------------


def sabotage(kind: str) -> Rule:
    """The shipped rule, spoilt."""
    rule = copy.deepcopy(lopt.load("digits-lstm")).requires_grad_(False)
    weights = dict(rule.named_parameters())
    for part in kind.split("+"):
        factor = {"x100": 100.0, "flipped": -1.0}[part.split()[1]]
        for name, weight in weights.items():
            if part.startswith("all") or name in ("w_out", "b_out"):
                weight.mul_(factor)
    return rule


def train(widths: tuple[int, ...], activation: type[nn.Module], seed: int, steps: int, rule: Rule | str | None,
          guard: bool = False) -> float:  # fmt: skip
    """Final loss on the whole train split; rule None is AdamW with its defaults."""
    x, y = load_digits()["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise((64, *widths, 10)):
            layers += [nn.Linear(a, b), activation()]
        model = nn.Sequential(*layers[:-1])
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        if rule is None
        else lopt.LearnedOptimizer(model.parameters(), rule, guard=guard)
    )
    for step in range(steps):
        index = draw_indices(derive_seeds(seed, "guard", step), 128, len(x))

        def closure(index: Tensor = index) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


NETWORKS = {"sigmoid": ((20,), nn.Sigmoid), "relu": ((40, 40), nn.ReLU)}
SABOTAGES = ("all x100", "out x100", "out flipped", "all flipped", "out x100+all flipped", "all x100+out flipped")


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("kind", "steps"), [*((kind, 200) for kind in SABOTAGES), ("out flipped", 1000), ("all x100", 1000)]
)
def test_a_sabotaged_rule_ends_near_adamw(network: str, kind: str, steps: int) -> None:
    for seed in range(3):
        reference = train(*NETWORKS[network], seed, steps, None)
        assert train(*NETWORKS[network], seed, steps, sabotage(kind), guard=True) <= 1.3 * reference


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_without_the_guard_a_flipped_rule_diverges(network: str) -> None:
    reference = train(*NETWORKS[network], 0, 200, None)
    loss = train(*NETWORKS[network], 0, 200, sabotage("out flipped"))
    assert not loss < 10 * reference


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_ten_horizons_end_no_worse_than_adamw(network: str) -> None:
    for seed in range(3):
        reference = train(*NETWORKS[network], seed, 1000, None)
        assert train(*NETWORKS[network], seed, 1000, "digits-lstm", guard=True) <= 1.1 * reference


@pytest.mark.slow
def test_an_intact_rule_pays_little_within_its_horizon() -> None:
    for network in NETWORKS:
        for seed in range(3):
            bare = train(*NETWORKS[network], seed, 100, "digits-lstm")
            assert train(*NETWORKS[network], seed, 100, "digits-lstm", guard=True) <= 1.05 * bare
