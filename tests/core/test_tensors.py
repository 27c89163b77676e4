"""Named randomness and flat parameters."""

from __future__ import annotations

import pytest
import torch
from lopt_kernels.launching.random import fold

from lopt.core.random import (
    derive_seeds,
    draw_indices,
    draw_normal,
    draw_truncated_normal,
    draw_uniform,
    fold_in,
    make_generator,
)
from lopt.core.tensors import ParamSpec


def test_unflatten_undoes_flatten_with_and_without_batch_dimensions() -> None:
    params = {"w": torch.randn(3, 4), "b": torch.randn(4), "s": torch.randn(())}
    spec = ParamSpec.of(params)
    assert spec.size == 17
    flat = spec.flatten(params)
    for name, value in spec.unflatten(flat).items():
        assert torch.equal(value, params[name])
    batched = spec.unflatten(flat.expand(5, 2, 17))
    assert batched["w"].shape == (5, 2, 3, 4)
    assert batched["s"].shape == (5, 2)
    assert torch.equal(spec.flatten(batched), flat.expand(5, 2, 17))


def test_unflatten_gives_views() -> None:
    spec = ParamSpec(("w", "b"), ((2, 2), (3,)))
    flat = torch.zeros(7)
    spec.unflatten(flat)["b"].fill_(1)
    assert flat.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_words_are_those_of_splitmix64() -> None:
    """The first outputs of the generators that start at 0 and 1234567, from the reference implementation."""
    expected = torch.tensor([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=torch.uint64)
    assert torch.equal(fold(torch.tensor(0), torch.arange(3)), expected.view(torch.int64))
    assert int(fold(torch.tensor(1234567), torch.tensor(0))) == 6457827717110365317


def test_seeds_depend_on_every_argument_and_on_nothing_else() -> None:
    base = derive_seeds(1, "batch", 2, 3)
    assert base == derive_seeds(1, "batch", torch.tensor(2), 3)
    others = [derive_seeds(2, "batch", 2, 3), derive_seeds(1, "init", 2, 3), derive_seeds(1, "batch", 3, 2)]
    assert len({int(s) for s in [base, *others]}) == 4
    slots = torch.arange(1000)
    assert derive_seeds(1, "batch", slots, 0).unique().numel() == 1000
    assert derive_seeds(1, "batch", slots, 0)[7] == derive_seeds(1, "batch", 7, 0)


def test_draws_are_uniform_and_independent_between_seeds() -> None:
    seeds = derive_seeds(0, "test", torch.arange(400))
    u = draw_uniform(seeds, 100)
    assert u.shape == (400, 100)
    assert u.min() >= 0
    assert u.max() < 1
    # 40,000 draws: the mean has standard error 0.0014, a decile's share 0.0015, a correlation 0.005
    assert abs(u.mean() - 0.5) < 0.006
    shares = torch.histc(u.float(), bins=10, min=0, max=1) / u.numel()
    assert (shares - 0.1).abs().max() < 0.0075
    centred = u - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 0.025
    assert abs((centred[:, 1:] * centred[:, :-1]).mean() * 12) < 0.025


def test_indices_cover_the_range_and_stay_inside() -> None:
    index = draw_indices(derive_seeds(0, "x", torch.arange(50)), 200, 7)
    assert index.unique().tolist() == list(range(7))


def test_truncated_normal_numbers_are_drawn_anew_beyond_two_deviations() -> None:
    drawn = draw_truncated_normal((300, 100), 0.5, make_generator(3))
    plain = torch.randn(300, 100, generator=make_generator(3)) / 2
    inside = plain.abs() <= 1
    assert drawn.abs().max() <= 1
    assert torch.equal(drawn[inside], plain[inside])
    # Of a standard normal one that is cut at 2: sqrt(1 - 4 pdf(2) / (cdf(2) - cdf(-2))).
    assert float(drawn.std()) == pytest.approx(0.5 * 0.8796, rel=0.01)
    assert float(drawn[~inside].std()) == pytest.approx(0.5 * 0.8796, rel=0.05)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=make_generator(derive_seeds(0, "x")))
    draw_uniform(derive_seeds(0, "x", 1), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_counter_may_be_a_number_or_a_tensor() -> None:
    seeds = derive_seeds(0, "x", torch.arange(3))
    for counter in (0, 1, 10**6):
        assert torch.equal(fold_in(seeds, counter), fold_in(seeds, torch.tensor(counter)))


def test_normal_draws_are_standard_normal_and_named_by_their_seed() -> None:
    seeds = derive_seeds(0, "x", torch.arange(1000))
    draws = draw_normal(seeds, 101)
    assert draws.shape == (1000, 101)
    assert abs(draws.mean()) < 4 / draws.numel() ** 0.5
    assert abs(draws.var() - 1) < 4 * (2 / draws.numel()) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / draws.numel()) ** 0.5
    assert (draws.T.cov() - torch.eye(101)).abs().max() < 6 / 1000**0.5
    assert torch.equal(draw_normal(seeds[5:6], 101)[0], draws[5])
    assert not torch.equal(draws[0], draws[1])
