"""What an optimizer tells of itself after a run: how far it came, and how often something had to be put right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.optim.guard.state import GuardState
from lopt.optim.units import STEP


class Report(NamedTuple):
    """The counts that `LearnedOptimizer.report` returns: whether gradients or the rule itself were at fault, how often.

    Attributes:
        steps: updates of the parameter that has had the most, with those before a resume.
        skipped: steps of single parameters that were left out because their gradients were not finite, since the
            optimizer was made.
        limited: gradients of single parameters that had entries beyond +-2^30, which counted as that, likewise.
        clipped: steps of single parameters that the guard shortened, likewise.
        failures: losses that made the guard undo steps of the rule.
        fallbacks: times that AdamW took over.
        returns: times that the rule took over again.
        adamw_steps: steps that AdamW made in place of the rule.
    """

    steps: int
    skipped: int
    limited: int
    clipped: int
    failures: int
    fallbacks: int
    returns: int
    adamw_steps: int

    def __str__(self) -> str:
        return (
            f"{self.steps} steps; skipped for gradients that are not finite: {self.skipped}; gradients limited: "
            f"{self.limited}; clipped: {self.clipped}; undone: {self.failures}; AdamW took over {self.fallbacks} times "
            f"for {self.adamw_steps} steps in all and gave back {self.returns} times"
        )


class Counts:
    """What an optimizer counts while it steps, without waiting for a device, and what it warns of, once each.

    Args:
        name: of the rule, for a warning.
        horizon: steps of the longest run on which the rule was trained, if its card tells; longer ones are warned of.
    Attributes:
        tally: on each device, of single parameters: those that were skipped, whose gradients were limited, and whose
            steps the guard clipped, int64 `[3]`.
        steps: of the run so far; None: to be read from the parameters' state, as after loading.
    """

    def __init__(self, name: str, horizon: int | None) -> None:
        self.name, self.horizon = name, horizon
        self.tally: dict[torch.device, Tensor] = {}
        self.steps: int | None = 0
        self._warned: set[str] = set()

    def start_tally(self, device: torch.device) -> None:
        """Begin to count on a device, if that is new; to be called outside of graphs, which only add to what there is.

        Args:
            device: of a parameter that is going to be stepped.
        """
        if device not in self.tally:
            self.tally[device] = torch.zeros(3, dtype=torch.int64, device=device)

    def count_step(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Count one more step, and warn where the run goes beyond the rule's horizon.

        Args:
            states: of all parameters; looked at, which waits for the device, in the first step after loading only.
        """
        # A graph would hold the count of the moment at which it was traced.
        if torch.compiler.is_compiling():
            return
        self.steps = (read_steps(states) if self.steps is None else self.steps) + 1
        if self.horizon is not None and self.steps > self.horizon:
            self.warn_once(
                f"this run goes beyond the {self.horizon} steps on which rule {self.name!r} was trained (its "
                "card's horizon): watch the loss, or use guard=True, which falls back to AdamW where that is better."
            )

    def warn_once(self, message: str) -> None:
        """Warn, the first time that this is to be said; to be called by a function that `step` calls.

        The warning then is shown for the line of the user's that calls `step`, through torch's two wrappers.
        """
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)

    def report(self, states: Iterable[Mapping[str, Any]], guard: GuardState) -> Report:
        """All counts as numbers; waits for the device.

        Args:
            states: of all parameters.
            guard: a fresh one where there is no guard.
        """
        tallies = [tally.tolist() for tally in self.tally.values()]
        skipped, limited, clipped = (sum(counts) for counts in zip([0, 0, 0], *tallies, strict=True))
        decided = (guard.failures, guard.fallbacks, guard.returns, guard.adamw_steps)
        return Report(read_steps(states), skipped, limited, clipped, *decided)


def read_steps(states: Iterable[Mapping[str, Any]]) -> int:
    """The most updates that a parameter has had, which is how far a run is; waits for the device.

    A parameter that had no gradient at times, or one that was not finite, has had less.
    """
    return max((int(state[STEP]) for state in states if STEP in state), default=0)
