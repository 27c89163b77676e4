"""The users that guesses are judged on, and what a base learner guesses after a rule's steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopt.core.random import derive_seeds, draw_uniform
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import Rule
from lopt.tasks import Batch, Task
from lopt.tasks.recommend import Recommend

STREAM = "new users"
DRAWS = 3
CHUNK = 2**23
"""Parameters of users that are adapted together."""


class NewUsers(NamedTuple):
    """T = users x draws tasks, the draws of a user next to each other.

    Attributes:
        tasks: of the family.
        known: the ratings that are known, all of equal weight.
        asked: all others of each user.
        draws: of a user's known ratings.
    """

    tasks: Task
    known: Batch
    asked: Batch
    draws: int

    def score(self, stars: Tensor) -> Tensor:
        """How far guesses are off in the mean, `[users]`: over a user's films, then over the draws.

        Args:
            stars: guesses for the films asked for, 0 for one star, `[T, n]`.
        """
        weight = self.asked["weight"].double()
        errors = (stars - self.asked["stars"]).abs().double()
        return ((errors * weight).sum(1) / weight.sum(1)).view(-1, self.draws).mean(1)


def draw_users(family: Recommend, *, pool: str = "test", draws: int = DRAWS, seed: int = 0) -> NewUsers:
    """All users of a pool, each with several draws of the ratings that are known.

    Args:
        family: which says how many are known.
        seed: of the draws.
    """
    numbers = family.pools[pool]
    users = torch.arange(numbers.start, numbers.stop).repeat_interleave(draws)
    seeds = derive_seeds(seed, STREAM, users, torch.arange(draws).repeat(len(numbers)))
    tasks = family.divide(users, draw_uniform(seeds, family.films.shape[1]))
    known, asked = (family.full_batch(tasks, len(users), split) for split in ("train", "test"))
    assert known is not None
    assert asked is not None
    return NewUsers(tasks, known, asked, draws)


def predict_by_rule(rule: Rule, family: Recommend, users: NewUsers, num_steps: int) -> Tensor:
    """Probabilities of the stars of the films asked for, `[T, n, 5]`, after steps of a rule on the known ratings.

    Args:
        num_steps: at least 1.
    """
    loop = InnerLoop(rule, family, 0, lambda seeds: torch.full_like(seeds, num_steps))
    parts = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(users.tasks["user"])), max(1, CHUNK // family.spec.size)):
            slots = loop.start(rows)._replace(task={key: x[rows] for key, x in users.tasks.items()})
            if rule.initial_params is None:
                slots = loop.measure_first(slots)
            params = loop.unroll(slots, num_steps, restart=False).slots.params
            parts.append(family.predict(family.spec.unflatten(params), users.asked["film"][rows]))
    return torch.cat(parts)
