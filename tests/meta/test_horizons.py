"""Schedules of horizons: what they draw, and when a curriculum goes on."""

from __future__ import annotations

import pytest
import torch

from lopt.core.random import derive_seeds
from lopt.meta.unroll.horizons import HORIZONS, HorizonSchedule

SEEDS = derive_seeds(0, "horizon", torch.arange(30_000))


@pytest.mark.parametrize("name", HORIZONS)
def test_a_horizon_depends_on_its_seed_alone(name: str) -> None:
    horizon = HORIZONS[name]()
    drawn = horizon(SEEDS[:50])
    assert drawn.dtype == torch.int64
    assert drawn.min() >= 1
    assert torch.equal(drawn, torch.cat([horizon(seed[None]) for seed in SEEDS[:50]]))
    assert horizon(SEEDS[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["constant", "log_uniform"])
def test_validations_change_no_horizon_outside_a_curriculum(name: str) -> None:
    horizon = HORIZONS[name]()
    before = horizon(SEEDS[:50])
    horizon.validated(True)
    assert torch.equal(horizon(SEEDS[:50]), before)


def test_constant_horizons_are_the_given_one() -> None:
    assert HORIZONS["constant"](steps=7)(SEEDS[:9]).tolist() == [7] * 9  # type: ignore[call-arg]


def test_log_uniform_horizons_reach_both_ends_and_no_further() -> None:
    drawn = HORIZONS["log_uniform"](low=3, high=6)(SEEDS)  # type: ignore[call-arg]
    assert drawn.unique().tolist() == [3, 4, 5, 6]
    assert HORIZONS["log_uniform"](low=5, high=5)(SEEDS).unique().tolist() == [5]  # type: ignore[call-arg]


def test_log_uniform_horizons_have_equal_shares_per_octave() -> None:
    drawn = HORIZONS["log_uniform"](low=16, high=127)(SEEDS)  # type: ignore[call-arg]
    shares = torch.stack([((drawn >= low) & (drawn < 2 * low)).double().mean() for low in (16, 32, 64)])
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3), rtol=0.04, atol=0)  # five standard deviations


def test_log_uniform_horizons_of_other_seeds_are_others() -> None:
    horizon = HORIZONS["log_uniform"](low=100, high=100_000)  # type: ignore[call-arg]
    assert horizon(SEEDS[:100]).unique().numel() > 95


def draw(horizon: HorizonSchedule) -> int:
    (found,) = horizon(SEEDS[:5]).unique().tolist()
    return int(found)


@pytest.mark.parametrize("needed", [1, 3])
def test_a_curriculum_goes_on_after_enough_improvements_and_stays_at_its_last_stage(needed: int) -> None:
    horizon = HORIZONS["curriculum"](stages=(4, 9, 20), improvements=needed)  # type: ignore[call-arg]
    drawn = []
    for _ in range(4 * needed):
        drawn.append(draw(horizon))
        horizon.validated(False)
        horizon.validated(True)
        horizon.validated(False)
    assert drawn == [4] * needed + [9] * needed + [20] * 2 * needed


def test_a_curriculum_that_never_improves_never_leaves_its_first_stage() -> None:
    horizon = HORIZONS["curriculum"](stages=(4, 9))  # type: ignore[call-arg]
    for _ in range(20):
        horizon.validated(False)
    assert draw(horizon) == 4


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("constant", {"steps": 0}, "steps.*0"),
        ("log_uniform", {"low": 0}, "low.*0"),
        ("log_uniform", {"low": 9, "high": 8}, "low=9.*high=8"),
        ("curriculum", {"stages": ()}, "stages"),
        ("curriculum", {"stages": (5, 5)}, r"increasing.*5, 5"),
        ("curriculum", {"stages": (9, 5)}, r"increasing.*9, 5"),
        ("curriculum", {"stages": (0, 5)}, "stages.*0"),
        ("curriculum", {"improvements": 0}, "improvements.*0"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HORIZONS[name](**options)  # type: ignore[arg-type]
