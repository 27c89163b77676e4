"""What a guard remembers from one loss to the next, and how a saved optimizer holds it: as a list of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf, nan
from typing import Any


class Mode(Enum):
    """Who makes the steps at present, and until when; `Guard` has the table of transitions.

    The values are the three numbers that a saved state has for a mode: whether AdamW steps, whether the rule is on
    probation, and whether AdamW's window is compared with the rule's last.
    """

    RULE = (0, 0, 0)
    PROBATION = (0, 1, 0)
    COMPARISON = (1, 0, 1)
    ADAMW = (1, 0, 0)

    @property
    def is_adamw(self) -> bool:
        """Whether AdamW alone makes the steps, so that a bad loss is not the rule's fault, and no turn of it ends."""
        return bool(self.value[0])


@dataclass
class GuardState:
    """All that a guard remembers. A saved optimizer holds it as a list of numbers, in the order of the fields.

    Attributes:
        seen: losses that were observed.
        share: of the learned rule in the next step; 1 is the rule alone, 0 is AdamW alone.
        failures: losses that were not finite or stayed above the running loss; undone.
        fallbacks: times that AdamW took over, for any reason.
        returns: times that the learned rule took over again.
        adamw_steps: steps that AdamW made.
        mode: who makes them; three numbers.
        first_loss, running_loss, last_loss: the first loss, an average in which no single one counts for much, and the
            last one, cut off at the limit. Losses and the deviation are NaN before the first loss.
        deviation: mean absolute deviation of the loss, from differences of neighbours.
        peak: the largest loss of this window.
        early: the rule has not shown anything yet: the snapshot is the run's start.
        raised, risen: losses in a row above the limit; with the running loss above the snapshot's.
        window, position: steps of this window, and how many of them are over.
        unchallenged: steps since rule and AdamW were last compared.
        patience: of these, how many bring the next comparison about.
        cooldown, remaining, turn: steps of AdamW's next turn, steps that are left of this one, and its length.
        snapshot_loss: the mean loss where the snapshot was taken.
        sums: of the losses of the window's first and second half; two numbers.
        rates: relative progress per step of the last window under the rule, and under AdamW; two numbers.
    """

    seen: int = 0
    share: float = 1.0
    failures: int = 0
    fallbacks: int = 0
    returns: int = 0
    adamw_steps: int = 0
    mode: Mode = Mode.RULE
    first_loss: float = nan
    running_loss: float = nan
    last_loss: float = nan
    deviation: float = nan
    peak: float = -inf
    early: bool = True
    raised: int = 0
    risen: int = 0
    window: int = 0
    position: int = 0
    unchallenged: int = 0
    patience: int = 0
    cooldown: int = 0
    remaining: int = 0
    turn: int = 0
    snapshot_loss: float = -inf
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rates: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def to_numbers(self) -> list[float]:
        """All fields as plain numbers, in their order, which any format of checkpoints can hold.

        Returns:
            29 floats; whole numbers and flags as floats, too.
        """
        numbers: list[float] = []
        for value in vars(self).values():
            if isinstance(value, Mode):
                numbers += map(float, value.value)
            elif isinstance(value, list):
                numbers += value
            else:
                numbers.append(float(value))
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> GuardState:
        """The state that `to_numbers` wrote, bit for bit, with every field in its own type again.

        Raises:
            ValueError: the list has another length.
        """
        fresh = cls()
        expected = len(fresh.to_numbers())
        if len(numbers) != expected:
            raise ValueError(f"a guard's state has {expected} numbers, got {len(numbers)}")
        # A fresh state tells how many numbers a field has, and of which type it is.
        remaining: Iterator[float] = iter(numbers)
        values: dict[str, Any] = {}
        for name, default in vars(fresh).items():
            if isinstance(default, Mode):
                values[name] = Mode(tuple(int(next(remaining)) for _ in default.value))
            elif isinstance(default, list):
                values[name] = [next(remaining) for _ in default]
            else:
                values[name] = type(default)(next(remaining))
        return cls(**values)
