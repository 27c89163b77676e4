"""Classes by the nearest: examples, and prototypes in a space that was learned on other classes.

Source: Snell, Swersky & Zemel 2017, arXiv 1703.05175 (prototypical networks; episodes of more ways than are asked for).
Differs from the source: the network is the family's own without its last layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.random import derive_seeds, make_generator
from lopt.evaluation.classes.episodes import Episodes
from lopt.tasks import TaskFamily
from lopt.tasks.few_shot import FewShotClasses
from lopt.tasks.module import draw_weights


def classify_by_nearest(episodes: Episodes) -> Tensor:
    """Gives each query the class of the example that it is nearest to, `[T, n]`."""
    nearest = torch.cdist(episodes.queries.flatten(2), episodes.support.flatten(2)).argmin(2)
    return episodes.classes.gather(1, nearest)


def classify_by_prototypes(embed: Callable[[Tensor], Tensor], episodes: Episodes) -> Tensor:
    """Gives each query the class whose examples have the nearest mean, `[T, n]`.

    Args:
        embed: inputs `[n, ...]` to vectors `[n, d]`.
    """
    with torch.no_grad():
        found = [
            score_by_prototypes(embed(support), classes, embed(queries)).argmax(1)
            for support, classes, queries, _ in zip(*episodes, strict=True)
        ]
    return torch.stack(found)


def score_by_prototypes(support: Tensor, classes: Tensor, queries: Tensor) -> Tensor:
    """Logits `[m, ways]`: minus the squared distances to the means of classes.

    Args:
        support: vectors `[n, d]`.
        classes: int64 `[n]`, each from 0 to ways - 1 at least once.
        queries: vectors `[m, d]`.
    """
    members = F.one_hot(classes).to(support)
    means = members.T @ support / members.sum(0)[:, None]
    return -(queries[:, None] - means).square().sum(2)


def train_prototypes(
    family: FewShotClasses,
    steps: int,
    *,
    episodes: TaskFamily | None = None,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> nn.Module:
    """A network that puts examples of a class next to each other, learned on the classes for training.

    Args:
        family: of the network: its own without the last layer.
        episodes: where the tasks are from, one a step; by default the family. Transforms of it are for more examples.
        steps: of Adam, whose learning rate falls to 0 as a cosine.
        seed: of weights and episodes.
    Returns:
        A module from inputs `[n, ...]` to vectors `[n, d]`.
    """
    whole = family.build_network()
    whole.load_state_dict(draw_weights(family.build_network, make_generator(derive_seeds(seed, "prototypes"))))
    network, episodes = whole[:-1], episodes or family
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        seeds = derive_seeds(seed, "episode", torch.tensor([step], dtype=torch.int64))
        tasks = episodes.sample_all(seeds)
        support, queries = (episodes.batch(tasks, seeds, split) for split in ("train", "inner_valid"))
        vectors = network(torch.cat([support["x"][0], queries["x"][0]]))
        count = support["y"].shape[1]
        loss = F.cross_entropy(score_by_prototypes(vectors[:count], support["y"][0], vectors[count:]), queries["y"][0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network
