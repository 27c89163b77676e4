"""What a run does to a rule's meta-weights beside stepping them: start from a file, freeze some, average them.

Frozen weights are still the rule's and are saved with it; they are no parameters of the outer optimizer, and evolution
strategies do not perturb them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lopt.core.names import suggest
from lopt.rules import Rule
from lopt.rules.files import load


def copy_weights(rule: Rule, *, learned: bool = False) -> dict[str, Tensor]:
    """All weights by name, or those that are learned; copies, which later steps do not change.

    Args:
        learned: without buffers and frozen weights.
    """
    weights: Mapping[str, Tensor] = rule.meta_weights() if learned else rule.state_dict()
    return {name: value.detach().clone() for name, value in weights.items()}


def measure_norm(weights: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all weights together; 0 of none."""
    norms = [torch.linalg.vector_norm(weight.detach()) for weight in weights.values()]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def copy_rule(rule: Rule, weights: Mapping[str, Tensor]) -> Rule:
    """Another rule of the same kind with these weights, on the same device; the given one is left as it is.

    Args:
        weights: all of the rule's, by name.
    """
    copied = deepcopy(rule)
    copied.load_state_dict(dict(weights))
    return copied


def load_weights(rule: Rule, name_or_path: str) -> None:
    """Give `rule` the meta-weights of a shipped rule or a rule file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a rule file, or of another rule or configuration.
    """
    found = load(name_or_path)
    if (found.name, found.config) != (rule.name, rule.config):
        raise ValueError(
            f"trainer.warm_start: {name_or_path} holds {found.describe()}, but the run trains {rule.describe()}. "
            "Train the rule with the file's configuration"
        )
    rule.load_state_dict(found.state_dict())


def freeze_weights(rule: Rule, patterns: Sequence[str]) -> None:
    """Leave learned only the meta-weights whose names fit one of the patterns (as file names do); all without one.

    The rule is changed in place: the others no longer ask for gradients.

    Raises:
        ValueError: a pattern fits no meta-weight; near names are suggested.
    """
    # Typing errors are found before anything is frozen: one alone would freeze all.
    names = list(rule.meta_weights())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"trainer.train_only: {pattern!r} fits no meta-weight of {rule.name!r}. {suggest(pattern, names)}"
            )
    if patterns:
        for name, weight in rule.meta_weights().items():
            weight.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))


def update_average(average: dict[str, Tensor], rule: Rule, decay: float, step: int) -> None:
    """Move the average of the learned weights, in place, after outer step `step` (from 1).

    It is over about the last 1 / (1 - decay) steps, and over a tenth of them at first, when weights move most.
    """
    # A long memory of the first, worst weights would spoil the average of short runs.
    decay = min(decay, step / (step + 9))
    for name, weight in rule.meta_weights().items():
        average[name].lerp_(weight.detach(), 1 - decay)
