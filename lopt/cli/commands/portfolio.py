"""`lopt portfolio`: learn which few settings are worth trying on a new model, and show what they reach on families that
were left out.

Scores are kept in a folder, a file for each family: a command that was interrupted, or is given more families, runs
only what is missing.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lopt.cli.console import RUNS, make_folder
from lopt.core.printing import say

if TYPE_CHECKING:
    from lopt.optim.portfolio.files import Portfolio

EXAMPLES = """
\b
Examples:
  lopt portfolio
  lopt portfolio --families mlp,conv,tabular --settings 32 --steps 200 --out runs/mine

The settings are drawn as a random search draws them (optimizer, learning rate, schedule, betas); --learned adds rules
that need none. `lopt.choose(model, loss, num_steps, portfolio="runs/mine/portfolio.json")` uses the result.
"""


@click.command(name="portfolio", short_help="Learn which settings to try first on a new model.", epilog=EXAMPLES)
@click.option("--families", help="Comma-separated, see `lopt list tasks` [default: 14 of them].")
@click.option("--settings", "count", type=click.IntRange(min=8), default=64, show_default=True, help="Drawn at random.")
@click.option("--learned", default="lopt-base,digits-lstm", show_default=True, help="Shipped rules, or none.")
@click.option("--steps", type=click.IntRange(min=20), default=100, show_default=True, help="Of a run.")
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Tasks of each family.")
@click.option("--size", type=click.IntRange(1, 8), default=4, show_default=True, help="Settings that are kept.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws other settings.")
@click.option("--out", type=click.Path(path_type=Path), default=RUNS / "portfolio", show_default=True)
def learn_portfolio(
    families: str | None, count: int, learned: str, steps: int, seeds: int, size: int, seed: int, out: Path
) -> None:
    """Choose a few settings, greedily, that are together the best on many families; leave each out to judge them."""
    import torch

    from lopt.core.files import write_atomic
    from lopt.core.names import choose
    from lopt.evaluation.portfolio.learning import learn
    from lopt.evaluation.portfolio.matrix import FAMILIES
    from lopt.evaluation.portfolio.pictures import draw_left_out
    from lopt.evaluation.portfolio.space import draw_settings
    from lopt.optim.portfolio.files import save_portfolio
    from lopt.optim.portfolio.setting import Setting
    from lopt.tasks import TASKS

    torch.set_num_threads(1)
    names = [choose("family", name.strip(), TASKS) for name in families.split(",")] if families else list(FAMILIES)
    extra = [] if learned == "none" else [Setting(name.strip()) for name in learned.split(",")]
    console = Console()
    make_folder(out)
    portfolio, found = learn(
        {name: TASKS[name]() for name in names},
        draw_settings(count, seed),
        extra,
        num_steps=steps,
        num_seeds=seeds,
        size=size,
        folder=out / "scores",
        command=shlex.join(["lopt", *sys.argv[1:]]),
        on_family=lambda name: say(console, f"{count + len(extra)} settings x {seeds} tasks x {steps} steps of {name}"),
    )
    path, picture = save_portfolio(portfolio, out / "portfolio.json"), out / "left-out.png"
    write_atomic(picture, draw_left_out(found, size))
    print_portfolio(portfolio, console)
    say(console, f"{path}\n{picture}")


def print_portfolio(portfolio: Portfolio, console: Console) -> None:
    """Print a portfolio's settings in their order, and what so many of them miss on families that were left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "setting", "missing", "by lopt.choose", "random search"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    *_, (label, told) = portfolio.card["left_out"].items()
    for i, setting in enumerate(portfolio.settings):
        figures = (told["portfolio"][i], told["by lopt.choose"][i], told["random search"].get(str(i + 1)))
        cells = ["" if figure is None else f"{figure:.3f}" for figure in figures]
        table.add_row(str(i + 1), setting.describe(), *cells)
    console.print(table)
    for label, told in portfolio.card["left_out"].items():
        low, high = told["interval"]
        size, equal = len(portfolio.settings), told["equal random search"]
        say(console, f"{label}: {size} reach what a random search reaches with {equal} (95 %: {low} to {high})")
