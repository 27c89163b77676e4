"""A safety net under a learned rule: clipped steps, and AdamW wherever the rule does worse.

The tensor part (`init_guard`, `guard_step`, `save_snapshot`, `restore_snapshot`) works on one parameter, or on k equal
ones at once; the decisions (`Guard`) need the training loss only and are made on the host. Costs 12 bytes per
parameter: AdamW's two moments, which are kept warm, and a snapshot, because a parameter that a broken rule has thrown
far away is not a place from which AdamW recovers in time.

Source: Premont-Schwarz et al. 2022, arXiv 2201.12426 ("LGL2O": a learned optimizer guarded by a plain one; the expected
losses of both decide which of them steps).
Differs from the source: the two take turns and are compared by the progress of the training loss; steps are clipped; a
failed turn is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import isfinite, sqrt

import torch
from torch import Tensor

Accumulators = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]

LEARNED, ADAMW = 0.0, 1.0
LEVEL_DECAY = 0.9
NORM_DECAY = 0.95
NORM_GROWTH = 2.0
FIRST_DEVIATION = 0.03
FIRST_SHARE = 1 / 256
LONG_RISE = 3
EARLY = 0.25
RECKLESS_RISE, RECKLESS_DEVIATIONS, RECKLESS_GAIN = 0.2, 2.5, 0.5


@dataclass(frozen=True)
class GuardOptions:
    """When the guard steps in. Steps are optimizer steps; losses are compared relative to their own noise.

    Args:
        clip: an update of a tensor longer than `clip` times its running norm is shortened to that.
        seed_norm: what the running norm starts from, in lengths of AdamW's first step `lr sqrt(n)`.
        rise_steps: so many losses in a row above the running level are a failure (one is, while the rule is on trial),
            and three times as many with the running level above the snapshot's; a non-finite loss is one at once.
        rise: how far above the level a loss must be, as a share of the level ...
        rise_deviations: ... and in mean absolute deviations of the loss; the larger counts.
        window: steps of the first window; every window that passes doubles the next.
        max_window: steps of the longest window.
        progress: a window passes if its second half's mean loss is below the first half's by this many standard errors.
        patience: so many steps without a comparison bring one about; doubles whenever the rule wins.
        cooldown: AdamW's turn after it has won or the rule has failed, in windows; doubles every time. After it the
            rule is on trial for one window, in which its share doubles from 1/256 every step.
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


class Guard:
    """Decides, from the losses alone, who makes the next step; see `GuardOptions`.

    Call `observe` with the loss at the current parameters before every step, then, in this order: if `restore`, put the
    snapshot back and make no step, because the gradient belongs to other parameters; if `save`, take a snapshot; step
    with `share`.

    Args:
        num_steps: planned losses, if known: then no trial of the rule begins that could not be undone before the end.
    Attributes:
        share: of the learned rule in the next step; 1 is the rule alone, 0 is AdamW alone.
        save, restore: see above.
        failures: losses that were not finite or stayed above their level; undone.
        fallbacks: times that AdamW took over, for any reason.
        returns: times that the learned rule took over again.
        adamw_steps: steps that AdamW made.
    """

    def __init__(self, options: GuardOptions | None = None, num_steps: int | None = None) -> None:
        self.options, self.num_steps = options or GuardOptions(), num_steps
        self._seen = 0
        self.save = self.restore = False
        self.share = 1.0
        self.failures = self.fallbacks = self.returns = self.adamw_steps = 0
        self._mode, self._trial, self._probe = LEARNED, False, False
        self._first = self._level = self._last = self._deviation = float("nan")
        self._bad = self._above = 0
        self._window, self._at = self.options.window, 0
        self._sums, self._peak = [0.0, 0.0], float("-inf")
        self._early = True  # the rule has not shown anything yet: the snapshot is the run's start
        self._rates = [0.0, 0.0]  # relative progress per step of the last window under the rule, under AdamW
        self._since, self._patience = 0, self.options.patience
        self._cooldown, self._left = self.options.cooldown * self.options.window, 0
        self._turn, self._snapshot_level = 0, float("-inf")

    def observe(self, loss: float | None) -> None:
        """Take note of the loss at the current parameters and decide on the next step. None: nothing is decided."""
        self.save = self.restore = False
        if loss is not None:
            self._decide(float(loss))
        self.share = (
            0.0 if self._mode == ADAMW else min(1.0, FIRST_SHARE * 2 ** min(self._at, 8)) if self._trial else 1.0
        )
        self.adamw_steps += self._mode == ADAMW and not self.restore

    def state(self) -> list[float]:
        """All that it remembers, as plain numbers."""
        return [float(value) for value in (*self._scalars(), *self._sums, *self._rates)]

    def load(self, state: Sequence[float]) -> None:
        """Go on from what `state` returned, bitwise.

        Raises:
            ValueError: the list has another length.
        """
        if len(state) != len(self.state()):
            raise ValueError(f"a guard's state has {len(self.state())} numbers, got {len(state)}")
        names, values = list(_SCALARS), list(state)
        for name, value in zip(names, values, strict=False):
            setattr(self, name, type(getattr(self, name))(value))
        self._sums, self._rates = values[len(names) : -2], values[-2:]

    def _scalars(self) -> list[float]:
        return [getattr(self, name) for name in _SCALARS]

    def _decide(self, loss: float) -> None:
        self._seen += 1
        if self._level != self._level and isfinite(loss):  # the first
            self._first = self._level = loss
            self._last, self._deviation = loss, FIRST_DEVIATION * abs(loss)
            self._mark(loss)
        if self._is_failure(loss):
            self._fail()
            return
        self._peak = max(self._peak, loss)
        self._sums[int(self._at >= self._window // 2)] += min(loss, self._limit())
        self._at, self._since = self._at + 1, self._since + 1
        if self._at == self._window:
            self._close_window()

    def _limit(self) -> float:
        o = self.options
        return self._level + max(o.rise * abs(self._level), o.rise_deviations * self._deviation)

    def _is_failure(self, loss: float) -> bool:
        """Whether the loss is beyond repair; updates level and deviation, in which no single loss counts for much."""
        if not isfinite(loss):
            return True
        limit = self._limit()
        self._bad = self._bad + 1 if loss > limit else 0
        far = loss > max(self._first, self._level + 10 * (limit - self._level))
        patience = 1 if self._trial else self.options.rise_steps
        if self._mode == LEARNED and (far or self._bad >= patience):
            return True
        bounded = min(loss, limit)
        self._deviation += (1 - LEVEL_DECAY) * (abs(bounded - self._last) / sqrt(2) - self._deviation)
        self._level += (1 - LEVEL_DECAY) * (bounded - self._level)
        self._last = bounded
        margin = max(self._deviation / 2, self.options.rise * abs(self._first))
        self._above = self._above + 1 if self._level > self._snapshot_level + margin else 0
        return self._mode == LEARNED and self._above >= LONG_RISE * self.options.rise_steps

    def _fail(self) -> None:
        """Undo the rule's turn and give AdamW a long one."""
        self.failures += 1
        self.restore = self._first == self._first  # else there is no snapshot
        self._bad = self._above = 0
        if self._mode == LEARNED:
            self._fall_back(compare=False)
        self._level = self._last = self._snapshot_level
        self._start_window()

    def _close_window(self) -> None:
        half = self._window // 2
        before, after = self._sums[0] / half, self._sums[1] / (self._window - half)
        error = self._deviation * sqrt(4 / self._window)
        rate = (before - after) / max(abs(before), 1e-30) / half
        self._rates[int(self._mode)] = rate
        if self._mode == ADAMW:
            self._close_adamw(after)
        else:
            self._close_learned(before - after, after, error)
        self._start_window()

    def _close_learned(self, gain: float, after: float, error: float) -> None:
        if self._early and self._is_reckless(after):
            self._fail()
            return
        passed = gain > self.options.progress * error
        worse = after > self._snapshot_level + 2 * error
        if self._trial and passed and not worse and self._rates[0] > self._rates[1]:
            self._trial, self._since = False, 0
            self._cooldown = max(self._cooldown // 2, self.options.cooldown * self.options.window)
        elif self._trial or not passed or self._since >= self._patience:
            self.restore = worse
            self._fall_back(compare=not self._trial)
            return
        self._window = min(2 * self._window, self.options.max_window)
        self._early = self._early and after > EARLY * self._first and self._window < self.options.max_window
        if not self._early:
            self._mark(after)

    def _is_reckless(self, after: float) -> bool:
        """Whether the rule has shaken the loss, above where it began, and has not brought it down by much."""
        shaken = self._peak - self._first > max(RECKLESS_RISE * abs(self._first), RECKLESS_DEVIATIONS * self._deviation)
        return shaken and after > RECKLESS_GAIN * self._first

    def _close_adamw(self, after: float) -> None:
        self._left -= self._window
        if self._probe:  # the rule's last window against this one
            self._probe = False
            self._since = 0
            if self._rates[1] <= self._rates[0]:
                self._patience = min(2 * self._patience, self.options.max_cooldown)
                self._return(after)
            else:
                self._begin_turn()
        elif self._left <= 0 and (self.num_steps is None or self._seen + 2 * self.options.max_window <= self.num_steps):
            self._trial = True
            self._window = max(self.options.window, min(self._turn // self.options.cooldown, self.options.max_window))
            self._return(after)
        else:
            self._window = min(2 * self._window, self.options.max_window, max(self._left, self.options.window))
            self._mark(after)

    def _fall_back(self, compare: bool) -> None:
        """AdamW's turn: of one window, to be compared with the rule's last, or a long one."""
        self.fallbacks += 1
        self._mode, self._trial, self._probe, self._early = ADAMW, False, compare, False
        if not compare:
            self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn = self._left = self._cooldown
        self._cooldown = min(2 * self._cooldown, self.options.max_cooldown)

    def _return(self, level: float) -> None:
        self.returns += 1
        self._mode = LEARNED
        self._mark(level)

    def _mark(self, level: float) -> None:
        self.save = True
        self._level = self._snapshot_level = level  # the average over steps lags behind a falling loss

    def _start_window(self) -> None:
        self._at, self._sums, self._peak = 0, [0.0, 0.0], float("-inf")


_SCALARS = (
    "_seen",
    "share",
    "failures",
    "fallbacks",
    "returns",
    "adamw_steps",
    "_mode",
    "_trial",
    "_probe",
    "_first",
    "_level",
    "_last",
    "_deviation",
    "_peak",
    "_early",
    "_bad",
    "_above",
    "_window",
    "_at",
    "_since",
    "_patience",
    "_cooldown",
    "_left",
    "_turn",
    "_snapshot_level",
)


def init_guard(p: Tensor, batch_ndim: int = 0) -> Accumulators:
    """The guard's state before the first step of a parameter `[*shape]`, or of k equal ones, `[k, *shape]`.

    Args:
        batch_ndim: 1 if the first dimension counts parameters.
    Returns:
        "guard_m", "guard_v" (AdamW's moments) fp32 and "guard_p" (the snapshot) in at least fp32, like `p`;
        "guard_norm" (the running norm of the steps; 0: not yet) fp32 and "guard_start" (the step from which the moments
        count) int64, `[]` or `[k]`.
    """
    batch = p.shape[:batch_ndim]
    m = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
    return {
        "guard_m": m,
        "guard_v": torch.zeros_like(m),
        "guard_p": p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True).contiguous(),
        "guard_norm": torch.zeros(batch, dtype=torch.float32, device=p.device),
        "guard_start": torch.zeros(batch, dtype=torch.int64, device=p.device),
    }


def guard_step(
    delta: Tensor,
    g: Tensor,
    state: Accumulators,
    step: Tensor,
    share: float | Tensor,
    lr_adamw: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    options: GuardOptions,
    reduce: Reduce | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Accumulators, Tensor]:
    """The step that is taken in place of `delta`; without host synchronisation.

    Args:
        delta: the learned rule's step, without weight decay, fp32 `[*shape]` or `[k, *shape]`.
        g: gradient, like `delta`.
        state: from `init_guard` or the previous call.
        step: updates made so far, int64 `[]` or `[k]`.
        share: of the learned rule, see `Guard.share`; a number, or a tensor `[]` or `[k]`.
        lr_adamw: AdamW's learning rate, also the unit of `GuardOptions.seed_norm`.
        betas, eps: AdamW's.
        reduce: sums a tensor over the shards of the parameter, where it is sharded.
        in_place: AdamW's moments and `delta` may be overwritten, which saves a third of the time; else it is pure.
    Returns:
        The step, the new state, and how many of the tensors were clipped or not finite, int64 `[]`.
    """
    axes = tuple(range(step.ndim, delta.ndim))
    wide = (*step.shape, *[1] * len(axes))
    beta1, beta2 = betas
    m, v = state["guard_m"], state["guard_v"]
    m = m.lerp_(g, 1 - beta1) if in_place else torch.lerp(m, g, 1 - beta1)
    v = (v.mul_(beta2) if in_place else v * beta2).addcmul_(g, g, value=1 - beta2)

    count = delta.numel() // max(1, step.numel())
    squares = torch.linalg.vector_norm(delta, dim=axes).square() if axes else delta * delta
    sums = torch.stack([squares, torch.full_like(squares, count)])
    squares, count_all = reduce(sums) if reduce is not None else sums
    norm, unit = squares.sqrt(), lr_adamw * count_all.sqrt()
    old = state["guard_norm"]
    old = torch.where(old > 0, torch.maximum(old, unit), options.seed_norm * unit)
    limit = options.clip * old
    clipped = ~(norm <= limit)
    finite = torch.isfinite(norm)
    new_norm = NORM_DECAY * old + (1 - NORM_DECAY) * torch.where(finite, torch.minimum(norm, NORM_GROWTH * old), old)
    scale = torch.where(clipped, limit / norm.clamp(min=1e-38), 1.0)
    scaled = delta.mul_(scale.view(wide)) if in_place else delta * scale.view(wide)
    delta = torch.where(finite.view(wide), scaled, 0.0)

    if not (isinstance(share, float) and share == 1.0):
        age = step - state["guard_start"] + 1
        correction1, correction2 = (1 - beta1**age).view(wide), (1 - beta2**age).sqrt().view(wide)
        own = m / (v.sqrt() / correction2 + eps) * (-lr_adamw / correction1)
        part = share.view(wide) if isinstance(share, Tensor) and share.ndim else share
        delta = torch.lerp(own, delta, part) if isinstance(part, Tensor) else own + part * (delta - own)
    new = state | {"guard_m": m, "guard_v": v, "guard_norm": new_norm}
    return delta, new, clipped.sum()


@torch.no_grad()
def save_snapshot(p: Tensor, state: Accumulators) -> None:
    """Keep the parameter as it is as the snapshot, in place."""
    state["guard_p"].copy_(p)


@torch.no_grad()
def restore_snapshot(p: Tensor, state: Accumulators, step: Tensor) -> None:
    """Put the snapshot back into the parameter and begin AdamW's moments anew, in place.

    Moments of gradients from where a broken rule has led would hold AdamW up for hundreds of steps.
    """
    p.copy_(state["guard_p"])
    state["guard_m"].zero_()
    state["guard_v"].zero_()
    state["guard_start"].copy_(step)
