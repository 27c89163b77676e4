"""Fine-tuning: Adam with a tuned learning rate, from random weights or from those of a classifier of other classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.random import derive_seeds, draw_indices, draw_uniform, make_generator
from lopt.core.tensors import Params
from lopt.evaluation.classes.episodes import classify_by_rule, draw_episodes
from lopt.rules import RULES, LearnedInit, Rule
from lopt.tasks.few_shot import FewShotClasses
from lopt.tasks.module import draw_weights

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates to choose from."""


class Tuned(NamedTuple):
    """A way of fine-tuning that was chosen on the tasks for validation.

    Attributes:
        rule: with the best learning rate, and maybe initial weights.
        lr: that learning rate.
        accuracy: on those tasks, in the mean.
    """

    rule: Rule
    lr: float
    accuracy: float


def tune_fine_tuning(family: FewShotClasses, num_steps: int, start: Params | None = None, count: int = 100) -> Tuned:
    """The best of `RATES` for `num_steps` of Adam on the support of a task.

    Args:
        start: weights that tasks begin with, those that are missing as 0; None draws all for each task.
        count: of tasks of the pool for validation.
    """
    shapes = {name: list(shape) for name, shape in zip(family.spec.names, family.spec.shapes, strict=True)}
    tuned, episodes = [], draw_episodes(family, count, pool="outer_valid")
    for lr in RATES:
        rule: Rule = RULES["adam"](lr=lr)
        if start is not None:
            rule = LearnedInit(shapes, "adam", {"lr": lr})
            rule.set_initial(
                {k: start[k] if k in start else torch.zeros(shape, dtype=torch.float32) for k, shape in shapes.items()}
            )
        found = classify_by_rule(rule, family, count, num_steps, pool="outer_valid")
        tuned.append(Tuned(rule, lr, float(episodes.score(found).mean())))
    return max(tuned, key=lambda x: x.accuracy)


def train_jointly(
    family: FewShotClasses, steps: int, *, batch_size: int = 128, learning_rate: float = 2e-3, seed: int = 0
) -> Params:
    """Weights of a classifier of all classes for training, without its last layer, which knows these alone.

    Args:
        family: whose network and examples are taken.
        steps: of Adam, whose learning rate falls to 0 as a cosine.
        batch_size: examples a step; each class is as frequent as any other.
        seed: of initial weights and batches.
    Returns:
        Parameters by name, all but the head's.
    """
    pool = family.pools["train"]
    initial = draw_weights(lambda: family.build_network(len(pool)), make_generator(derive_seeds(seed, "joint")))
    weights: Params = {name: nn.Parameter(p.clone()) for name, p in initial.items()}
    network = family.build_network(len(pool))
    optimizer = torch.optim.Adam(weights.values(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        classes = draw_indices(derive_seeds(seed, "joint characters", step), batch_size, len(pool))
        x = family.pick_examples(
            pool.start + classes, draw_uniform(derive_seeds(seed, "joint drawings", step), batch_size)
        )
        loss = F.cross_entropy(functional_call(network, weights, (x,)), classes)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return {name: p.detach() for name, p in weights.items() if not name.startswith("head.")}
