"""A portfolio learned: from settings and families to the file and to what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lopt.core.version import VERSION
from lopt.evaluation.portfolio.greedy import LeftOut, choose_greedily, find_regrets, leave_out
from lopt.evaluation.portfolio.matrix import measure_all
from lopt.optim.portfolio.choosing import plan_rounds
from lopt.optim.portfolio.files import Portfolio
from lopt.optim.portfolio.setting import Setting
from lopt.tasks import TaskFamily

DRAWN, WITH_LEARNED = "portfolio of drawn settings", "portfolio with learned rules"


def learn(
    families: Mapping[str, TaskFamily],
    drawn: Sequence[Setting],
    learned: Sequence[Setting],
    *,
    num_steps: int,
    num_seeds: int,
    size: int,
    folder: Path,
    command: str = "",
    on_family: Callable[[str], None] | None = None,
) -> tuple[Portfolio, dict[str, LeftOut]]:
    """Run all settings on all families, choose among them, and judge portfolios on families that were left out.

    Args:
        drawn: settings that random search draws from, too.
        learned: further ones, which only a portfolio may take.
        num_steps, num_seeds: of the runs.
        size: of the portfolio.
        folder: for scores, of which only those that are missing are measured.
        command: that repeats it, for the card.
        on_family: called with the name of a family before it is measured.
    Returns:
        The portfolio, chosen on all families; and what portfolios reach on families that were left out, from the drawn
        settings and, if there are any, with the learned ones.
    Raises:
        ValueError: fewer than two families, or runs too short for the rounds of `lopt.choose`.
    """
    if len(families) < 2:
        raise ValueError(f"a portfolio is chosen on some families and judged on another: give two, got {len(families)}")
    settings, rounds = [*drawn, *learned], plan_rounds(size, num_steps)
    scores = measure_all(families, settings, num_steps, num_seeds, folder, on_family)
    regrets, own, pool = find_regrets(scores), range(len(drawn)), range(len(settings))
    found = {DRAWN: leave_out(scores, own, own, size, rounds)}
    if learned:
        found[WITH_LEARNED] = leave_out(scores, pool, own, size, rounds)
    card = {
        "description": "settings that are together the best on many small families, the one to try first at the front",
        "command": command,
        "families": {name: family.describe() for name, family in families.items()},
        "steps": num_steps,
        "tasks": num_seeds,
        "settings": [setting.describe() for setting in settings],
        "regrets": {name: [round(x, 3) for x in row] for name, row in zip(scores, regrets.tolist(), strict=True)},
        "left_out": {label: summarize(one, size) for label, one in found.items()},
        "versions": {"lopt": VERSION, "torch": torch.__version__},
        "licence": "Apache-2.0",
    }
    return Portfolio([settings[j] for j in choose_greedily(regrets, size)], card), found


def summarize(found: LeftOut, size: int) -> dict[str, Any]:
    """What a card says of the families that were left out: mean regrets by number of settings, and what equals them."""
    kept = [round(x, 4) for x in found.portfolio[:, size - 1].tolist()]
    searches = [n for n in (1, 2, 4, 8, 16, 32) if n <= found.random.shape[1]]
    return {
        "portfolio": [round(x, 4) for x in found.portfolio.mean(0).tolist()],
        "by lopt.choose": [round(x, 4) for x in found.halved.mean(0).tolist()],
        "random search": {str(n): round(float(found.random[:, n - 1].mean()), 4) for n in searches},
        "equal random search": found.find_equal(size),
        "interval": list(found.find_equal_interval(size)),
        "families": dict(zip(found.families, kept, strict=True)),
    }
