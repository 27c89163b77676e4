"""What a guard remembers from one loss to the next, and how a saved optimizer holds it: as a list of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import inf, isfinite, isnan, nan
from numbers import Real
from typing import Any

LEAST = {"window": 2, "patience": 1, "cooldown": 1, "remaining": -inf}  # of whole numbers; of the others 0


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
    def from_numbers(cls, numbers: Any) -> GuardState:
        """The state that `to_numbers` wrote, bit for bit, with every field in its own type again.

        Args:
            numbers: of a saved optimizer, so maybe anything.
        Raises:
            ValueError: it is no list of as many numbers, or one that no guard leaves behind.
        """
        fresh = cls()
        expected = len(fresh.to_numbers())
        if not (isinstance(numbers, (list, tuple)) and all(isinstance(number, Real) for number in numbers)):
            raise ValueError(f"a guard's memory is a list of {expected} numbers, got a {type(numbers).__name__}")
        if len(numbers) != expected:
            raise ValueError(f"a guard's memory has {expected} numbers, got {len(numbers)}")
        # A fresh state tells how many numbers a field has, and of which type it is.
        remaining: Iterator[float] = iter(map(float, numbers))
        found: dict[str, Any] = {}
        for name, default in vars(fresh).items():
            length = (
                len(default.value) if isinstance(default, Mode) else len(default) if isinstance(default, list) else 0
            )
            found[name] = [next(remaining) for _ in range(length)] if length else next(remaining)
        # The decisions rely on what they left behind themselves.
        for name, default in vars(fresh).items():
            if not _is_possible(name, found[name], default, heard=not isnan(found["first_loss"])):
                raise ValueError(f"no guard remembers {name} {found[name]}: the state is damaged. Load another one.")
        if found["position"] >= found["window"]:
            raise ValueError(f"no guard is at step {found['position']} of a window of {found['window']} steps")
        kinds: dict[str, Any] = {name: type(default) for name, default in vars(fresh).items()}
        return cls(**{name: kinds[name](tuple(x) if kinds[name] is Mode else x) for name, x in found.items()})


def _is_possible(name: str, value: Any, default: Any, heard: bool) -> bool:
    """Whether a guard may have this in its memory.

    Args:
        value: of one field, in floats.
        default: of the same field.
        heard: there was a finite loss.
    """
    if isinstance(default, Mode):
        return tuple(value) in [mode.value for mode in Mode]
    if isinstance(default, list):
        return all(map(isfinite, value))
    if isinstance(default, bool):
        return value in (0, 1)
    if isinstance(default, int):
        return isfinite(value) and value == int(value) and value >= LEAST.get(name, 0)
    if name == "share":
        return bool(0 <= value <= 1)
    if name == "peak":
        return bool(value < inf)
    # Losses are known from the first finite one on, all at once, and are cut off at finite limits.
    return isfinite(value) if heard else repr(value) == repr(default)
