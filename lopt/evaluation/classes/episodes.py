"""The tasks that classifiers are judged on, and what a base learner says of them after a rule's steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from lopt.core.random import derive_seeds
from lopt.meta.unroll.draws import Draws
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import Rule
from lopt.tasks import Task
from lopt.tasks.few_shot import FewShotClasses

STREAM = "evaluation"
CHUNK = 2**23
"""Parameters of tasks that are adapted together."""


class Episodes(NamedTuple):
    """T tasks: examples with their classes, and queries whose classes are asked for.

    Attributes:
        support, queries: inputs `[T, n, ...]`.
        classes, answers: of these, int64 `[T, n]`, from 0.
    """

    support: Tensor
    classes: Tensor
    queries: Tensor
    answers: Tensor

    def score(self, found: Tensor) -> Tensor:
        """The share of right answers in every task `[T]`.

        Args:
            found: classes that the queries were given, `[T, n]`.
        """
        return (found == self.answers).float().mean(1)


def draw_tasks(family: FewShotClasses, count: int, *, seed: int = 0, pool: str = "test") -> Task:
    """The tasks that a rule is judged on, which `run_curves` has for the same numbers and seed.

    Args:
        count: of tasks.
        seed, pool: name them.
    """
    return _find_draws(family, seed, pool).start_tasks(torch.arange(count), torch.zeros(count, dtype=torch.int64))


def draw_episodes(family: FewShotClasses, count: int, *, seed: int = 0, pool: str = "test") -> Episodes:
    """The examples and queries of `draw_tasks`."""
    tasks, seeds = draw_tasks(family, count, seed=seed, pool=pool), torch.arange(count)
    support, queries = (family.batch(tasks, seeds, split) for split in ("train", "test"))
    return Episodes(support["x"], support["y"], queries["x"], queries["y"])


def classify_by_rule(
    rule: Rule, family: FewShotClasses, count: int, num_steps: int, *, seed: int = 0, pool: str = "test"
) -> Tensor:
    """The classes of all queries of the same tasks `[T, n]`, after steps of a rule on the support of each.

    Tasks start where the rule says, or where the family does.

    Args:
        family, count, seed, pool: as of `draw_episodes`.
        num_steps: on the support, at least 1.
    """
    draws = _find_draws(family, seed, pool)
    parts = []
    for ids in torch.split(torch.arange(count), max(1, CHUNK // family.spec.size)):
        # Its losses are recorded on the support: nothing is measured on queries before the end.
        loop = InnerLoop(rule, family, draws.seed, lambda seeds: torch.full_like(seeds, num_steps), pool=pool)
        with torch.no_grad():
            slots = loop.unroll(loop.start(ids), num_steps, restart=False).slots
            queries = family.batch(slots.task, ids, "test")["x"]
            logits = vmap(family.classify)(family.spec.unflatten(slots.params), queries)
        parts.append(logits.argmax(2))
    return torch.cat(parts)


def _find_draws(family: FewShotClasses, seed: int, pool: str) -> Draws:
    # As in `run_curves`: streams share no task with each other nor with meta-training.
    return Draws(family, int(derive_seeds(seed, STREAM)), pool=pool)
