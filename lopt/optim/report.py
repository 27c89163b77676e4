"""What an optimizer tells of itself after a run: how far it came, and how often something had to be put right."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.optim.guard.state import GuardState
from lopt.optim.options import ADAMW
from lopt.optim.plans import find_end, read_steps
from lopt.rules import Rule


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
        rule: the optimizer's.
        horizon: steps of the longest run on which the rule was trained, if its card tells; longer ones are warned of.
        guarded: with the guard, which follows the plan of the training, as some rules do.
    Attributes:
        tally: on each device, of single parameters: those that were skipped, whose gradients were limited, and whose
            steps the guard clipped, int64 `[3]`.
        steps: of each group so far; None: to be read from the parameters' state, as after loading.
    """

    def __init__(self, rule: Rule, horizon: int | None, guarded: bool) -> None:
        self.rule, self.horizon, self.guarded = rule, horizon, guarded
        self.tally: dict[torch.device, Tensor] = {}
        self.steps: list[int] | None = []
        self._warned: set[str] = set()

    def start_tally(self, device: torch.device) -> None:
        """Begin to count on a device, if that is new; to be called outside of graphs, which only add to what there is.

        Args:
            device: of a parameter that is going to be stepped.
        """
        if device not in self.tally:
            self.tally[device] = torch.zeros(3, dtype=torch.int64, device=device)

    def count_step(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Count one more step, and warn where the run goes beyond the rule's horizon, or beyond what was planned.

        Args:
            groups: the optimizer's `param_groups`.
            states: of all parameters; looked at, which waits for the device, in the first step after loading only.
        """
        # A graph would hold the count of the moment at which it was traced.
        if torch.compiler.is_compiling():
            return
        if self.steps is None:
            self.steps = [read_steps(states[p] for p in group["params"] if p in states) for group in groups]
        self.steps += [0] * (len(groups) - len(self.steps))
        # A group without gradients stands still in its plan, as the rule sees it.
        for i, group in enumerate(groups):
            for p in group["params"]:
                if p.grad is not None:
                    self.steps[i] += 1
                    break
        # Rules that may run open have schedules for any length.
        if self.horizon is not None and not self.rule.open_ended and max(self.steps) > self.horizon:
            advice = "" if self.guarded else ", or use guard=True, which falls back to AdamW where that is better"
            self.warn_once(
                f"this run goes beyond the {self.horizon} steps on which rule {self.rule.name!r} was trained (its "
                f"card's horizon): watch the loss{advice}."
            )
        if (plan := self._find_overrun(groups, self.steps)) is not None:
            rule = [f"rule {self.rule.name!r}"] if self.rule.has_schedule else []
            followers = " and ".join(rule + ["the guard"] * self.guarded)
            later = ", or without it, and call cool_down before the end" if self.rule.open_ended else ""
            self.warn_once(
                f"this run goes beyond the plan of {followers}, num_steps={plan}. Construct the optimizer with the "
                f"number of steps of the whole training, those before a resume included{later}."
            )

    def _find_overrun(self, groups: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> int | None:
        """The plan that this step goes beyond, if one is followed by the rule in its own groups, or by the guard."""
        plan = find_end(groups) if self.guarded else None
        if plan is not None and max(steps) > plan:
            return plan
        if self.rule.has_schedule:
            for group, count in zip(groups, steps, strict=True):
                own = None if group["rule"] == ADAMW else group["num_steps"]
                if own is not None and count > own:
                    return int(own)
        return None

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
