"""The best meta-weights that validation has found so far: what a run hands back, and what its rule file holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lopt.meta.trainer.meta_weights import copy_rule, copy_weights
from lopt.meta.trainer.ranks import FailedLead
from lopt.rules import Rule
from lopt.rules.files import fingerprint, load, load_card

WEIGHTS = "best."
UNTRAINED = (
    "no validation was better than the one before training: the rule has the weights that training started from. "
    "Try another trainer.learning_rate, more trainer.steps or another estimator"
)


class Best:
    """What validations have come to, which the end of a run, its curricula and its rule file go by.

    Args:
        rule: before training; its weights are the best ones until a validation has spoken.

    Attributes:
        value: the best figure, of which lower is better; infinity before the first validation.
        step: outer steps after which it was reached.
        stale: validations since then.
        validated: outer steps before the last validation; -1 before the first.
        left_out, diverged: held-out tasks that say nothing of any rule, and those on which the best one fails.
        weights: all of the rule's, by name.
    """

    def __init__(self, rule: Rule) -> None:
        self.value, self.step, self.stale, self.validated = math.inf, 0, 0, -1
        self.left_out, self.diverged = 0, 0
        self.weights = copy_weights(rule)

    def hear(self, figures: Mapping[str, float], metric: str, step: int, weights: Mapping[str, Tensor]) -> bool:
        """Keep what was validated if it is better than all before it; returns whether it is.

        Args:
            figures: of the weights, as `lopt.meta.trainer.validation.Validation` has them.
            metric: the one that decides.
            step: outer steps that led to them.
            weights: all of the rule's, which are copied.
        """
        improved = figures[metric] < self.value
        self.validated, self.stale = step, 0 if improved else self.stale + 1
        if improved:
            self.value, self.step = figures[metric], step
            self.left_out, self.diverged = int(figures["left_out"]), int(figures["diverged"])
            self.weights = {name: weight.clone() for name, weight in weights.items()}
        return improved

    def build(self, rule: Rule) -> Rule:
        """A rule like the given one with the best weights; a copy, which training does not touch."""
        return copy_rule(rule, self.weights)

    def check(self, tasks: int, leads: bool) -> None:
        """Never hand back in silence what has learned nothing: warn of a rule that is best before training.

        Args:
            tasks: that are validated on.
            leads: whether this rank is the one that explains.
        Raises:
            ValueError: the rule diverges on all tasks that say anything.
            FailedLead: this on rank 0.
        """
        sound = tasks - self.left_out
        if self.diverged >= sound:
            raise (ValueError if leads else FailedLead)(
                f"the rule diverges on all {sound} held-out tasks, with its best weights (step {self.step}), too: "
                "training has come to nothing. Lower trainer.learning_rate or the rule's output scale"
            )
        if self.step == 0 and leads:
            warnings.warn(UNTRAINED, stacklevel=3)

    def describe(self, metric: str) -> dict[str, Any]:
        """What a rule's card says of it, so that nobody takes a rule that has learned nothing for a trained one.

        Args:
            metric: that decides.
        """
        return {
            "best_step": self.step,
            "improved": self.step > 0,  # on the weights that training started from
            "validation": {metric: self.value if math.isfinite(self.value) else None},
            "left_out": self.left_out,
            "diverged": self.diverged,
        }

    # -- saving ----------------------------------------------------------------------------------------------------

    def gather_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds of it: tensors by name, and entries of its metadata."""
        tensors = {f"{WEIGHTS}{name}": value for name, value in self.weights.items()}
        # JSON has no infinity: none is best before the first validation.
        value = self.value if math.isfinite(self.value) else None
        metadata = {"best": value, "best_step": self.step, "stale": self.stale, "validated": self.validated}
        return tensors, metadata | {"left_out": self.left_out, "diverged": self.diverged}

    def restore_state(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Take back what `gather_state` returned.

        Args:
            tensors, metadata: all of the checkpoint; what is not this class's is left alone.
        """
        self.weights = {k.removeprefix(WEIGHTS): v for k, v in tensors.items() if k.startswith(WEIGHTS)}
        self.value = math.inf if metadata["best"] is None else metadata["best"]
        self.step, self.stale, self.validated = (metadata[key] for key in ("best_step", "stale", "validated"))
        self.left_out, self.diverged = metadata["left_out"], metadata["diverged"]


def holds_rule(path: Path, rule: Rule, training: Mapping[str, Any]) -> bool:
    """Whether a rule file is that of a run's present state: not missing, not damaged, and not one that a kill has left
    from before.

    Args:
        rule: with the weights that it should have.
        training: what its card should say under this name, wall-clock time aside.
    """
    try:
        found, card = load(path), load_card(path)
    except (OSError, ValueError):
        return False
    told = card.get("training")
    same = isinstance(told, dict) and {**told, "seconds": None} == {**training, "seconds": None}
    return same and fingerprint(found) == fingerprint(rule)
