"""One rule out of several that were trained alike: the mean of their meta-weights.

Source: Wortsman et al. 2022, arXiv 2203.05482 ("Model soups", the uniform one). Trainings that differ in their seed end
apart where the meta-loss hardly tells, and a mean is closer to the middle. It takes a common start, as the rule `base`
has: units of networks that start anywhere do not correspond to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from lopt.rules.base import Rule
from lopt.rules.files import find_longest_run

TASKS = ("config", "tasks")
"""Entries of a card that are long, and differ in what the seed has drawn."""


def average_rules(rules: Sequence[Rule]) -> Rule:
    """A rule like all of `rules` whose meta-weights are their means; what is not learned stays as it is.

    Args:
        rules: of one kind; meta-weights `[...]` of each have equal shapes and keep their dtype. They are not changed.
    Raises:
        ValueError: fewer than two, rules or options that differ, or numbers that differ although none learns them.
    """
    if len(rules) < 2:
        raise ValueError(f"an average is of two rules or more, got {len(rules)}")
    first, *others = rules
    for other in others:
        if (other.name, other.config) != (first.name, first.config):
            raise ValueError(
                f"only rules with equal options can be averaged, got {first.describe()}, {other.describe()}"
            )
    averaged = deepcopy(first)
    learned = dict(first.named_parameters())
    means = {}
    for key, value in first.state_dict().items():
        values = torch.stack([rule.state_dict()[key] for rule in rules])
        if key not in learned and (values != value).any():
            raise ValueError(f"{key} differs, and is not learned: these rules cannot be averaged")
        means[key] = values.double().mean(0).to(value.dtype) if key in learned else value
    averaged.load_state_dict(means)
    return averaged


def average_cards(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The card of an average: what all cards say, the first one's tasks, and under "averaged" what else each one says.

    The longest run is that of any.
    """
    first, *others = cards
    shared = {key: first[key] for key in first if key in TASKS or all(card.get(key) == first[key] for card in others)}
    runs = [steps for card in cards if (steps := find_longest_run(card))]
    shared |= {"longest_run": max(runs)} if runs else {}
    own = [{key: value for key, value in card.items() if key not in (*shared, *TASKS)} for card in cards]
    return shared | {"averaged": own}
