"""The decisions of the guard, a safety net under a learned rule: clipped steps, and AdamW wherever the rule does worse.

They need the training loss only and are made on the host; `lopt.optim.guard.steps` carries them out on the tensors.

Source: Premont-Schwarz et al. 2022, arXiv 2201.12426 ("LGL2O": a learned optimizer guarded by a plain one; the expected
losses of both decide which of them steps).
Differs from the source: the two take turns and are compared by the progress of the training loss; steps are clipped; a
failed turn is undone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, isnan, sqrt
from typing import Any

from lopt.optim.guard.state import GuardState, Mode

RUNNING_DECAY = 0.9
FIRST_DEVIATION = 0.03
FIRST_SHARE, DOUBLINGS = 1 / 256, 8
LONG_RISE = 3
EARLY = 0.25
RECKLESS_RISE, RECKLESS_DEVIATIONS, RECKLESS_GAIN = 0.2, 2.5, 0.5


@dataclass(frozen=True)
class GuardOptions:
    """When the guard of an optimizer steps in. Steps are optimizer steps; losses are compared relative to their noise.

    Args:
        clip: an update of a tensor longer than `clip` times its running norm is shortened to that.
        seed_norm: what the running norm starts from, in lengths of AdamW's first step `lr sqrt(n)`.
        rise_steps: so many losses in a row above the running loss are a failure (one is, while the rule is on
            probation), and three times as many with the running loss above the snapshot's; a non-finite loss is one at
            once.
        rise: how far above the running loss a loss must be, as a share of it ...
        rise_deviations: ... and in mean absolute deviations of the loss; the larger counts.
        window: steps of the first window; every window that passes doubles the next.
        max_window: steps of the longest window.
        progress: a window passes if its second half's mean loss is below the first half's by this many standard errors.
        patience: so many steps without a comparison bring one about; doubles whenever the rule wins.
        cooldown: AdamW's turn after it has won or the rule has failed, in windows; doubles every time. After it the
            rule is on probation for one window, in which its share doubles from 1/256 every step.
        max_cooldown: the longest turn, in steps.
    Raises:
        ValueError: an option out of range, by its name.
    """

    clip: float = 10.0
    seed_norm: float = 10.0
    rise_steps: int = 3
    rise: float = 0.05
    rise_deviations: float = 4.0
    window: int = 16
    max_window: int = 128
    progress: float = 1.0
    patience: int = 256
    cooldown: int = 14
    max_cooldown: int = 20_000

    def __post_init__(self) -> None:
        least = {"clip": 1, "rise_steps": 1, "window": 4, "max_window": self.window, "patience": 1, "cooldown": 1}
        for field in fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 0)
            if not (isfinite(value) and value >= low):
                raise ValueError(f"guard option {field.name} must be finite and at least {low}, got {value}")
            if isinstance(field.default, int) and int(value) != value:
                raise ValueError(f"guard option {field.name} must be a whole number, got {value}")


def read_guard(given: bool | GuardOptions | Mapping[str, Any]) -> GuardOptions | None:
    """The guard's options, from what a user may write for the optimizer's option `guard`.

    Returns:
        None for no guard; the defaults for True and for what a dictionary leaves out.
    Raises:
        ValueError: something else, an unknown option or one out of range.
    """
    if isinstance(given, GuardOptions):
        return given
    if isinstance(given, bool):
        return GuardOptions() if given else None
    try:
        return GuardOptions(**given)
    except TypeError as error:
        raise ValueError(f"guard must be True, False, GuardOptions or a dictionary of them, got {given!r}") from error


class Guard:
    """Decides, from the losses alone, who makes the next step; see `GuardOptions`.

    Call `observe` with the loss at the current parameters before every step, then, in this order: if `restore`, put the
    snapshot back and make no step, because the gradient belongs to other parameters; if `save`, take a snapshot; step
    with `share`.

    Losses are looked at in windows. From a mode, what happens leads to the next one:

        RULE        the loss fails                                      ADAMW       `_fail`: undone
                    a window without progress, or patience is over      COMPARISON  `_compare`
                    a window that passes                                RULE        `_go_on`: snapshot, longer window
        PROBATION   the loss fails                                      ADAMW       `_fail`: undone
                    a window that passes and beats AdamW's last         RULE        `_trust`: shorter cooldown
                    any other window                                    ADAMW       `_dismiss`
        COMPARISON  a window no better than the rule's last             RULE        `_return`: longer patience
                    a better one                                        ADAMW       `_begin_turn`: longer cooldown
        ADAMW       a window, and the turn is over                      PROBATION   `_begin_probation`
                    any other window                                    ADAMW       `_stay`: snapshot, longer window

    Where AdamW steps, only a loss that is not finite fails; it is undone, and the mode stays.

    Args:
        num_steps: planned losses, if known: then no probation begins that could not be undone before the end.
    Attributes:
        now: all that it remembers, with the counts that users see.
        save, restore: see above.
    """

    def __init__(self, options: GuardOptions | None = None, num_steps: int | None = None) -> None:
        self.options, self.num_steps = options or GuardOptions(), num_steps
        self.reset()

    def reset(self, memory: Sequence[float] | None = None) -> None:
        """Go on where a saved run was, or, without its memory, begin anew: nothing has been heard yet.

        Args:
            memory: of `GuardState.to_numbers`, as a saved optimizer has it under "guard_memory".
        Raises:
            ValueError: it is not what a guard remembers.
        """
        self.save = self.restore = False
        o = self.options
        fresh = GuardState(window=o.window, patience=o.patience, cooldown=o.cooldown * o.window)
        self.now = fresh if memory is None else GuardState.from_numbers(memory)

    @property
    def share(self) -> float:
        """The learned rule's share in the next step: 1 is the rule alone, 0 is AdamW alone.

        Between them while the rule is on probation, so that a broken one is seen before it does harm.
        """
        return self.now.share

    def observe(self, loss: float | None) -> None:
        """Take note of the loss at the current parameters and decide on the next step.

        Args:
            loss: of any size and sign, finite or not. None: there is none, and nothing is decided.
        """
        now = self.now
        self.save = self.restore = False
        if loss is not None:
            self._decide(float(loss))
        if now.mode is Mode.PROBATION:
            now.share = min(1.0, FIRST_SHARE * 2 ** min(now.position, DOUBLINGS))
        else:
            now.share = 0.0 if now.mode.is_adamw else 1.0
        now.adamw_steps += now.mode.is_adamw and not self.restore

    def _decide(self, loss: float) -> None:
        now = self.now
        now.seen += 1
        if isnan(now.running_loss) and isfinite(loss):  # the first
            now.first_loss = now.running_loss = now.last_loss = loss
            now.deviation = FIRST_DEVIATION * abs(loss)
            self._mark(loss)
        if self._is_failure(loss):
            self._fail()
            return
        # In a window's sums a loss counts no more than the limit: one outlier must not decide on a turn.
        now.peak = max(now.peak, loss)
        now.sums[int(now.position >= now.window // 2)] += min(loss, self._limit())
        now.position, now.unchallenged = now.position + 1, now.unchallenged + 1
        if now.position == now.window:
            self._close_window()

    # -- single losses -------------------------------------------------------------------------------------------------

    def _limit(self) -> float:
        """What a loss must not exceed for long."""
        o, now = self.options, self.now
        return now.running_loss + max(o.rise * abs(now.running_loss), o.rise_deviations * now.deviation)

    def _is_failure(self, loss: float) -> bool:
        """Whether the loss is beyond repair; updates running loss and deviation."""
        if not isfinite(loss):
            return True
        now, limit = self.now, self._limit()
        rule_steps = not now.mode.is_adamw
        # A jump far beyond the limit fails at once, a loss above it only after some more: noise is forgiven.
        now.raised = now.raised + 1 if loss > limit else 0
        far = loss > max(now.first_loss, now.running_loss + 10 * (limit - now.running_loss))
        allowed = 1 if now.mode is Mode.PROBATION else self.options.rise_steps
        if rule_steps and (far or now.raised >= allowed):
            return True
        # Averages take no more than the limit, so that no single loss counts for much.
        bounded = min(loss, limit)
        now.deviation += (1 - RUNNING_DECAY) * (abs(bounded - now.last_loss) / sqrt(2) - now.deviation)
        now.running_loss += (1 - RUNNING_DECAY) * (bounded - now.running_loss)
        now.last_loss = bounded
        # A rise so slow that the limit rises along is seen against the loss of the snapshot.
        margin = max(now.deviation / 2, self.options.rise * abs(now.first_loss))
        now.risen = now.risen + 1 if now.running_loss > now.snapshot_loss + margin else 0
        return rule_steps and now.risen >= LONG_RISE * self.options.rise_steps

    def _fail(self) -> None:
        """Undo the rule's turn and give AdamW a long one; where AdamW steps, only undo."""
        now = self.now
        now.failures += 1
        self.restore = not isnan(now.first_loss)  # else there is no snapshot
        now.raised = now.risen = 0
        if not now.mode.is_adamw:
            self._dismiss()
        if self.restore:
            now.running_loss = now.last_loss = now.snapshot_loss
        self._start_window()

    # -- windows -------------------------------------------------------------------------------------------------------

    def _close_window(self) -> None:
        now = self.now
        # Progress is the fall from the first half's mean to the second's; the error is that of such a difference.
        half = now.window // 2
        before, after = now.sums[0] / half, now.sums[1] / (now.window - half)
        error = now.deviation * sqrt(4 / now.window)
        if now.mode.is_adamw:
            now.remaining -= now.window
        now.rates[int(now.mode.is_adamw)] = (before - after) / max(abs(before), 1e-30) / half
        if now.mode is Mode.COMPARISON:
            self._close_comparison(after)
        elif now.mode is Mode.ADAMW:
            self._close_turn(after)
        else:
            self._close_rule(before - after, after, error)
        self._start_window()

    def _close_rule(self, gain: float, after: float, error: float) -> None:
        now = self.now
        # While the snapshot is still the run's start, a rule that only shakes the loss is undone to there.
        if now.early and self._is_reckless(after):
            self._fail()
            return
        passed = gain > self.options.progress * error
        worse = after > now.snapshot_loss + 2 * error
        if now.mode is Mode.PROBATION:
            if passed and not worse and now.rates[0] > now.rates[1]:
                self._trust(after)
            else:
                self.restore = worse
                self._dismiss()
        elif passed and now.unchallenged < now.patience:
            self._go_on(after)
        else:
            self.restore = worse
            self._compare()

    def _is_reckless(self, after: float) -> bool:
        """Whether the rule has shaken the loss, above where it began, and has not brought it down by much."""
        now = self.now
        large = max(RECKLESS_RISE * abs(now.first_loss), RECKLESS_DEVIATIONS * now.deviation)
        return now.peak - now.first_loss > large and after > RECKLESS_GAIN * now.first_loss

    def _close_comparison(self, after: float) -> None:
        now = self.now
        now.unchallenged = 0
        if now.rates[1] <= now.rates[0]:
            self._return(after)
        else:
            self._begin_turn()

    def _close_turn(self, after: float) -> None:
        now = self.now
        # Probation may fail at its end, and the snapshot that is then put back costs as many steps again.
        enough = self.num_steps is None or now.seen + 2 * self.options.max_window <= self.num_steps
        if now.remaining <= 0 and enough:
            self._begin_probation(after)
        else:
            self._stay(after)

    # -- transitions ---------------------------------------------------------------------------------------------------

    def _go_on(self, after: float) -> None:
        """RULE -> RULE."""
        now, longest = self.now, self.options.max_window
        now.window = min(2 * now.window, longest)
        now.early = now.early and after > EARLY * now.first_loss and now.window < longest
        if not now.early:  # until then the snapshot stays that of the run's start
            self._mark(after)

    def _compare(self) -> None:
        """RULE -> COMPARISON."""
        self.now.fallbacks += 1
        self.now.mode, self.now.early = Mode.COMPARISON, False

    def _dismiss(self) -> None:
        """RULE or PROBATION -> ADAMW."""
        self.now.fallbacks += 1
        self.now.early = False
        self._begin_turn()

    def _begin_turn(self) -> None:
        """COMPARISON, or any mode of the rule -> ADAMW."""
        now = self.now
        now.mode = Mode.ADAMW
        now.turn = now.remaining = now.cooldown
        now.cooldown = min(2 * now.cooldown, self.options.max_cooldown)

    def _stay(self, after: float) -> None:
        """ADAMW -> ADAMW."""
        now, o = self.now, self.options
        now.window = min(2 * now.window, o.max_window, max(now.remaining, o.window))
        self._mark(after)

    def _begin_probation(self, after: float) -> None:
        """ADAMW -> PROBATION, for a window that is the longer the longer the turn was."""
        now, o = self.now, self.options
        now.window = max(o.window, min(now.turn // o.cooldown, o.max_window))
        now.returns += 1
        now.mode = Mode.PROBATION
        self._mark(after)

    def _trust(self, after: float) -> None:
        """PROBATION -> RULE."""
        now, o = self.now, self.options
        now.mode, now.unchallenged = Mode.RULE, 0
        now.cooldown = max(now.cooldown // 2, o.cooldown * o.window)
        self._go_on(after)

    def _return(self, after: float) -> None:
        """COMPARISON -> RULE."""
        now = self.now
        now.patience = min(2 * now.patience, self.options.max_cooldown)
        now.returns += 1
        now.mode = Mode.RULE
        self._mark(after)

    def _mark(self, loss: float) -> None:
        """Take a snapshot here, where this is the mean loss; the running one lags behind a falling loss."""
        self.save = True
        self.now.running_loss = self.now.snapshot_loss = loss

    def _start_window(self) -> None:
        now = self.now
        now.position, now.sums, now.peak = 0, [0.0, 0.0], -inf
