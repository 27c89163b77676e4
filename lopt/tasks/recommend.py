"""Recommendation to a new user: how many stars they would give films, learned from a handful of their ratings.

Sources: Lee et al. 2019, arXiv 1908.00413 (MeLU: a user is a task, only the user's part is adapted); Agresti 2010,
"Analysis of Ordinal Categorical Data", section 4.1 (adjacent categories).
Differs from the sources: no demographics; stars are a distribution, whose median has the least mean error.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import POOLS, SPLITS, Batch, Task, TaskFamily
from lopt.tasks.data.ratings import FEWEST, STARS, load_ratings

SPREAD = 0.1
"""Standard deviation of the initial factors."""

R = TypeVar("R", bound="Recommend")


class Recommend(TaskFamily):
    """Stars of a user for films: softmax over k of k (level + taste . factors) + habit_k; mean negative log likelihood.

    k is -2 for one star to 2 for five. Level and factors are a film's own plus those of its genres. "user.taste"
    `[factors]` and "user.habit" `[5]` are the user's; the latter starts as the stars of all users for training are
    distributed. A task is a "user", int64 `[]`, with places of ratings that are "known" `[shots]` and "asked" for
    `[queries]`. The train split is the known ones, at every step; all others are those asked for, and, as whole splits,
    all but the known. Mini-batches are "film" and "stars" (0 for one) `[T, n]` int64 and "weight" `[T, n]`, 0 where a
    user has no further rating. A metric is "mae", the mean distance of the median from what the user gave, in stars.
    Pools have different users. By default 15,323 parameters.

    Args:
        shots: known ratings of a user.
        queries: others that the user is judged on in training, at most.
        factors: numbers that tell films apart.
        penalty: on the squares of the factors of a film, for each of its ratings.
        level_penalty: on the square of a film's level, for each of its ratings.
        data: "ml-100k" or "movielens:FOLDER", read by `load_ratings`.
        horizon: steps that a user is meant to be trained for.
    Raises:
        ValueError: an option is out of range, or `data` is not what it should be.
        FileNotFoundError: a file of `data` is missing.
        ImportError: the package that brings ml-100k is missing.
    """

    name = "recommend"
    judged = "inner_valid"
    pool_key = "user"
    pools: dict[str, range]

    def __init__(
        self,
        shots: int = 10,
        queries: int = 40,
        factors: int = 8,
        penalty: float = 0.2,
        level_penalty: float = 0.03,
        data: str = "ml-100k",
        horizon: int = 10,
    ) -> None:
        if not 1 <= shots < FEWEST or min(queries, factors) < 1 or min(penalty, level_penalty) < 0:
            raise ValueError(
                f"shots must be from 1 to {FEWEST - 1}, queries and factors at least 1 and penalties at least 0, got "
                f"shots={shots}, queries={queries}, factors={factors}, penalties of {penalty} and {level_penalty}"
            )
        self.shots, self.queries, self.factors, self.horizon = shots, queries, factors, horizon
        self.penalty, self.level_penalty = penalty, level_penalty
        self.films, self.stars, self.counts, self.genres, self.titles, self.pools = load_ratings(data)
        train = self.pools["train"]
        given = torch.arange(self.stars.shape[1]) < self.counts[:, None]
        frequent = self.stars[given & (torch.arange(len(given)) < train.stop)[:, None]].bincount(minlength=STARS)
        self.habit = (frequent.float() / frequent.sum()).log()

    def to(self: R, device: torch.device | str) -> R:
        self.films, self.stars, self.genres = (x.to(device) for x in (self.films, self.stars, self.genres))
        return self

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        users = self.pools[choose("pool", pool, POOLS)]
        most = self.films.shape[1]
        drawn = draw_uniform(seeds, 1 + most)
        return self.divide(users.start + (drawn[:, 0] * len(users)).long(), drawn[:, 1:])

    def divide(self, users: Tensor, places: Tensor) -> Task:
        """Tasks of these users: which of their ratings are known, and which are asked for.

        Args:
            users: int64 `[T]`.
            places: in [0, 1), `[T, most]`: the order of their ratings, of which the first are known.
        """
        missing = torch.arange(places.shape[1]) >= self.counts[users][:, None]
        order = (places + missing).argsort(1)[:, : self.shots + self.queries]
        return {"user": users, "known": order[:, : self.shots], "asked": order[:, self.shots :]}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        films, genres = self.genres.shape
        return {
            "films.level": torch.zeros(films, dtype=torch.float32),
            "films.factors": SPREAD * torch.randn(films, self.factors, generator=generator, dtype=torch.float32),
            "genres.level": torch.zeros(genres, dtype=torch.float32),
            "genres.factors": SPREAD * torch.randn(genres, self.factors, generator=generator, dtype=torch.float32),
            "user.taste": SPREAD * torch.randn(self.factors, generator=generator, dtype=torch.float32),
            "user.habit": self.habit.clone(),
        }

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        known = choose("split", split, SPLITS) == "train"
        return self._look_up(tasks["user"], tasks["known" if known else "asked"])

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        batch = self.batch(tasks, tasks["user"], split)
        if split == "train":
            return batch
        places = torch.arange(self.films.shape[1], device=self.films.device).expand(count, -1)
        whole = self._look_up(tasks["user"], places)
        return whole | {"weight": whole["weight"].scatter(1, tasks["known"], 0.0)}

    def _look_up(self, users: Tensor, places: Tensor) -> Batch:
        there = places < self.counts.to(places.device)[users][:, None]
        rows = users[:, None]
        return {"film": self.films[rows, places], "stars": self.stars[rows, places], "weight": there.float()}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        alone = self.losses({k: p[None] for k, p in params.items()}, {k: b[None] for k, b in batch.items()})
        return alone[0]

    def losses(self, params: Params, batch: Batch) -> Tensor:
        level, factors = self._find_films(params, batch["film"])
        logits = self._rate(params, *self._add_genres(params, level, factors, batch["film"]))
        found = logits.log_softmax(2).gather(2, batch["stars"][..., None])[..., 0]
        penalty = self.penalty * factors.square().sum(2) + self.level_penalty * level.square()
        return ((penalty - found) * batch["weight"]).sum(1) / batch["weight"].sum(1)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        shares = self.predict({k: p[None] for k, p in params.items()}, batch["film"][None])[0]
        weight = batch["weight"]
        return {"mae": ((find_median(shares) - batch["stars"]).abs() * weight).sum() / weight.sum()}

    def predict(self, params: Params, film: Tensor) -> Tensor:
        """Probabilities `[T, n, 5]` of the stars of films.

        Args:
            params: of T users, `[T, ...]` by name.
            film: int64 `[T, n]`.
        """
        logits = self._rate(params, *self._add_genres(params, *self._find_films(params, film), film))
        return logits.softmax(2)

    def _find_films(self, params: Params, film: Tensor) -> tuple[Tensor, Tensor]:
        """The films' own level `[T, n]` and factors `[T, n, factors]`."""
        level = params["films.level"].gather(1, film)
        return level, params["films.factors"].gather(1, film[..., None].expand(-1, -1, self.factors))

    def _add_genres(self, params: Params, level: Tensor, factors: Tensor, film: Tensor) -> tuple[Tensor, Tensor]:
        genres = self.genres[film].to(level.dtype)
        return level + (genres @ params["genres.level"][..., None])[..., 0], factors + genres @ params["genres.factors"]

    def _rate(self, params: Params, level: Tensor, factors: Tensor) -> Tensor:
        score = level + (factors @ params["user.taste"][..., None])[..., 0]
        steps = torch.arange(STARS, dtype=score.dtype, device=score.device) - STARS // 2
        return score[..., None] * steps + params["user.habit"][:, None]


def find_median(shares: Tensor) -> Tensor:
    """The median of distributions `[..., 5]`, 0 for one star: of all guesses the one with the least mean error."""
    return (shares.cumsum(-1) < 0.5).sum(-1).clamp(max=STARS - 1)
