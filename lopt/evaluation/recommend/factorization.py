"""Guesses without learning to learn: means of films, a user's offset, and factors of films with ridge regression.

Source: Hu, Koren & Volinsky 2008, ICDM (alternating least squares; here of given ratings only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.core.random import make_generator
from lopt.evaluation.recommend.users import NewUsers
from lopt.tasks.data.ratings import STARS
from lopt.tasks.recommend import Recommend

FACTORS, ROUNDS, SHRINKAGE = 8, 12, 5.0
PENALTIES = (5.0, 10.0, 20.0)
"""Of alternating least squares, to choose from."""

OFFSET_PENALTIES = (2.0, 4.0, 6.0)
TASTE_PENALTIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of a new user; the latter in units of ten times the mean square of the factors."""

Setting = tuple[float, float, float]
"""Penalties of the factors, of a user's offset, and of a user's taste."""

MEAN, OFFSET, RIDGE, WHOLE = "film mean", "+ user's offset", "factors + ridge", "factors + ridge, whole stars"


class Films(NamedTuple):
    """What is known of films from the users for training, in float64.

    Attributes:
        means: of their stars (0 for one), shrunk towards the mean of all by `SHRINKAGE` ratings, `[films]`.
        factors: `[films, FACTORS]`.
    """

    means: Tensor
    factors: Tensor


def factorize(family: Recommend, penalty: float, seed: int = 0) -> Films:
    """Factors of films, by alternating least squares on the users for training.

    Args:
        penalty: on the squares of factors of users and films.
        seed: of the factors that it begins with.
    """
    pool = family.pools["train"]
    films = len(family.genres)
    there = torch.arange(family.films.shape[1]) < family.counts[pool.start : pool.stop, None]
    rows = torch.arange(len(pool))[:, None].expand_as(there)[there]
    columns, stars = (x[pool.start : pool.stop][there] for x in (family.films, family.stars))
    given = torch.zeros(len(pool), films, dtype=torch.float64)
    given[rows, columns] = 1
    centred = torch.zeros_like(given)
    overall = stars.double().mean()
    centred[rows, columns] = stars.double() - overall
    means = overall + centred.sum(0) / (given.sum(0) + SHRINKAGE)
    centred[rows, columns] = stars.double() - means[columns]
    generator = make_generator(seed)
    factors = 0.1 * torch.randn(films, FACTORS, generator=generator, dtype=torch.float64)
    ones = torch.ones(films, 1, dtype=torch.float64)
    for _ in range(ROUNDS):
        users = _solve(torch.cat([factors, ones], 1), given, centred, penalty)
        taste, offset = users[:, :-1], users[:, -1:]
        factors = _solve(taste, given.T, ((centred - offset) * given).T, penalty)
    return Films(means, factors)


def _solve(features: Tensor, given: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Ridge regression for each row of `targets` `[n, m]`, 0 where nothing is `given`, on features `[m, f]`."""
    size = features.shape[1]
    squares = (given @ (features[:, :, None] * features[:, None]).flatten(1)).view(-1, size, size)
    found: Tensor = torch.linalg.solve(squares + penalty * torch.eye(size, dtype=torch.float64), targets @ features)
    return found


def fit_ridge(films: Films, users: NewUsers, offset_penalty: float, taste_penalty: float) -> Tensor:
    """Guesses `[T, n]` for the films asked for, by a ridge regression of each user on the factors of known films.

    Args:
        taste_penalty: infinite for no factors at all.
    """
    known, asked = (users.known["film"], users.asked["film"])
    width = 0 if taste_penalty == float("inf") else films.factors.shape[1]
    scale = 10 * float(films.factors.square().mean())
    features = torch.cat([films.factors[:, :width], torch.ones_like(films.factors[:, :1])], 1)
    penalties = torch.tensor([taste_penalty * scale] * width + [offset_penalty], dtype=torch.float64)
    x, y = features[known], users.known["stars"] - films.means[known]
    taste = torch.linalg.solve(x.mT @ x + penalties.diag(), (x.mT @ y[..., None])[..., 0])
    guesses: Tensor = films.means[asked] + (features[asked] @ taste[..., None])[..., 0]
    return guesses.clamp(0, STARS - 1)


class Chosen(NamedTuple):
    """A way of guessing with the settings that are best on the users for validation.

    Attributes:
        settings: what they are.
        stars: guesses for the users asked about, `[T, n]`.
    """

    settings: str
    stars: Tensor


def guess_without_rules(family: Recommend, users: NewUsers, validation: NewUsers) -> Mapping[str, Chosen]:
    """What is known without learning to learn, by name.

    Args:
        users: that guesses are for.
        validation: that settings are chosen on, by how far guesses are off.
    """
    fitted = {penalty: factorize(family, penalty) for penalty in PENALTIES}
    films = fitted[PENALTIES[0]]

    def guess(about: NewUsers, setting: Setting) -> Tensor:
        penalty, offset, taste = setting
        return fit_ridge(fitted[penalty], about, offset, taste)

    def choose(grid: Iterator[Setting], finish: Callable[[Tensor], Tensor]) -> Chosen:
        best = min(grid, key=lambda setting: float(validation.score(finish(guess(validation, setting))).mean()))
        return Chosen(", ".join(f"{x:g}" for x in best), finish(guess(users, best)))

    grid = (PENALTIES, OFFSET_PENALTIES, TASTE_PENALTIES)
    offsets = product(PENALTIES[:1], OFFSET_PENALTIES, [float("inf")])
    return {
        MEAN: Chosen("", films.means[users.asked["film"]].clamp(0, STARS - 1)),
        OFFSET: choose(offsets, lambda x: x),
        RIDGE: choose(product(*grid), lambda x: x),
        WHOLE: choose(product(*grid), torch.round),
    }
