"""The setting for a new model: a portfolio's settings tried on its first steps, the worse half dropped again and again.

Source: successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943. Differs from the source: nothing is run twice,
as the settings that are left go on from where they are, and the last one is the model's training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

from torch import Tensor, nn

from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.optim.portfolio.files import Portfolio, load_portfolio
from lopt.optim.portfolio.setting import Setting

SIZE = 4
FIRST_SHARE, LEAST_FIRST = 0.1, 5  # of the run, and in steps: the first round
LEAD = 0.6
"""Another setting takes the place of a portfolio's first one where its loss is below so much of that one's."""


@dataclass(frozen=True)
class Choice:
    """What `choose` leaves behind: a training in progress.

    Attributes:
        setting: that was chosen.
        optimizer: of the model, under this setting; go on with it.
        steps: that the model has made; the next batch is that of this step.
        losses: those of the steps that each setting made, by `Setting.describe`; the chosen one has `steps` of them.
        extra_steps: what the others have cost.
    """

    setting: Setting
    optimizer: LearnedOptimizer
    steps: int
    losses: dict[str, list[float]]
    extra_steps: int


class _Trial:
    """One setting on the model: its own parameters, buffers and optimizer, put into the model while it runs."""

    def __init__(
        self, setting: Setting, model: nn.Module, num_steps: int, start: dict[str, Tensor], lead: float
    ) -> None:
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.setting, self.model, self.state, self.lead = setting, model, start, lead
        self.optimizer = LearnedOptimizer(params, setting.build(), num_steps=num_steps)
        self.losses: list[float] = []

    def run(self, loss: Callable[[int], Tensor], end: int) -> None:
        """Go on to `end` steps in all, or to the first loss that is not finite."""
        self.model.load_state_dict(self.state)
        while len(self.losses) < end and not (self.losses and not isfinite(self.losses[-1])):
            self.optimizer.zero_grad()
            value = loss(len(self.losses))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise TypeError("loss(step) must return the model's loss as one number with a gradient")
            value.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step(loss=value)
            self.losses.append(float(value.detach()))
        self.state = copy_state(self.model)

    def score(self, end: int) -> float:
        """The mean loss in the second half of `end` steps, less its lead; infinite where a loss was not finite."""
        late = self.losses[end // 2 : end]
        if not late or not all(map(isfinite, self.losses)):
            return inf
        mean = sum(late) / len(late)
        return mean - (1 - self.lead) * abs(mean)


def choose(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    num_steps: int,
    *,
    portfolio: Portfolio | str | os.PathLike[str] | None = None,
    size: int = SIZE,
    first_steps: int | None = None,
) -> Choice:
    """Train a model for its first steps under each of a portfolio's settings, and leave it to the one that does best.

    All settings start from where the model is and see the same batches. After `first_steps` the better half goes on to
    twice as many steps, and so on until one is left, by the mean loss in the second half of the steps; the portfolio's
    first setting, the best in general, counts with 0.6 of its loss, as first steps are a poor witness of the last
    ones. With four settings that costs two fifths of the run beside it, and memory for four models and optimizers.

    >>> import lopt, torch
    >>> model, x = torch.nn.Linear(4, 1), torch.linspace(-1, 1, 32).view(8, 4)
    >>> def loss(step):
    ...     return torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    >>> choice = lopt.choose(model, loss, num_steps=200)
    >>> for step in range(choice.steps, 200):
    ...     choice.optimizer.zero_grad()
    ...     (value := loss(step)).backward()
    ...     choice.optimizer.step(loss=value)
    >>> bool(loss(200) < 0.01)
    True

    Args:
        model: its parameters and buffers are those of the chosen setting afterwards. It stays in its mode.
        loss: `loss(step) -> scalar`, the model's training loss on the batch of a step, from 0; it is asked for the same
            step once for each setting, and must then take the same batch.
        num_steps: planned for the whole training, those of the choice included.
        portfolio: or the path of its file; by default the one that comes with the package.
        size: settings to try, from the portfolio's front.
        first_steps: of the first round; by default a tenth of the run, at least 5.
    Returns:
        The chosen setting and its optimizer: the training goes on with step `choice.steps`.
    Raises:
        ValueError: a number out of its range, a run that is too short for the rounds, or no setting keeps its losses
            finite; the model is then as it was. Also what `load_portfolio` raises.
        TypeError: the loss is not one number with a gradient.
    """
    settings = _pick(portfolio, size)
    rounds = plan_rounds(len(settings), num_steps, first_steps)
    start = copy_state(model)
    trials = [_Trial(s, model, num_steps, start, LEAD if i == 0 else 1.0) for i, s in enumerate(settings)]
    try:
        best = _halve(trials, rounds, loss)
    except BaseException:
        model.load_state_dict(start)
        model.zero_grad()
        raise
    model.load_state_dict(best.state)
    model.zero_grad()
    made = sum(len(trial.losses) for trial in trials)
    losses = {trial.setting.describe(): trial.losses for trial in trials}
    return Choice(best.setting, best.optimizer, len(best.losses), losses, made - len(best.losses))


def _halve(trials: list[_Trial], rounds: list[int], loss: Callable[[int], Tensor]) -> _Trial:
    """The trial that is left after all rounds."""
    left = trials
    for i, end in enumerate(rounds):
        for trial in left:
            trial.run(loss, end)
        # Stable: of equal ones the first in the portfolio goes on.
        ranked = sorted((trial for trial in left if trial.score(end) < inf), key=lambda trial: trial.score(end))
        if not ranked:
            names = ", ".join(trial.setting.describe() for trial in trials)
            raise ValueError(f"no setting keeps its losses finite for {end} steps, look for NaN in the data: {names}")
        left = ranked[: 1 if i == len(rounds) - 1 else (len(left) + 1) // 2]
    return left[0]


def plan_rounds(count: int, num_steps: int, first_steps: int | None = None) -> list[int]:
    """The numbers of steps after which half of `count` settings are dropped, each twice the one before.

    Raises:
        ValueError: they do not fit into the run, or a number is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    first = max(LEAST_FIRST, round(FIRST_SHARE * num_steps)) if first_steps is None else first_steps
    if first < 1:
        raise ValueError(f"first_steps must be at least 1, got {first_steps}")
    rounds = [first * 2**i for i in range(max(0, count - 1).bit_length())]
    if rounds and rounds[-1] > num_steps:
        raise ValueError(
            f"{count} settings take rounds of {', '.join(map(str, rounds))} steps, and the run has {num_steps}: give "
            "fewer first_steps, a smaller size or a longer run"
        )
    return rounds


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, in memory of their own."""
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in model.state_dict().items()}


def _pick(portfolio: Portfolio | str | os.PathLike[str] | None, size: int) -> list[Setting]:
    """The settings to try."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    known = portfolio if isinstance(portfolio, Portfolio) else load_portfolio(portfolio)
    return known.settings[:size]
