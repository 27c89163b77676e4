"""What the programs beside this file share: the optimizers that they hold against each other, and the table.

A program has a function `train(make_optimizer, seed)` that trains once, with `make_optimizer(parameters, num_steps)`,
and returns what it has measured about ten times along the run: "train loss", "test loss" and whatever else.
"""

import argparse
import sys
import time
from collections.abc import Callable
from math import inf, isfinite
from statistics import fmean
from typing import Any

from torch.optim import AdamW, Optimizer

from lopt import LearnedOptimizer

MakeOptimizer = Callable[[Any, int], Optimizer]
Figures = dict[str, float]
Train = Callable[[MakeOptimizer, int], list[Figures]]

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEED = 100


def make_lopt(parameters: Any, num_steps: int) -> Optimizer:
    return LearnedOptimizer(parameters, num_steps=num_steps)


def make_adamw(rate: float) -> MakeOptimizer:
    def make(parameters: Any, num_steps: int) -> Optimizer:
        return AdamW(parameters, lr=rate)

    return make


def compare(title: str, train: Train, seeds: int) -> None:
    """Print the figures of lopt, of AdamW at 1e-3 and of AdamW at its best rate, means over seeds from 0 on."""
    rate = tune(train)
    at_end = ", at the grid's end" if rate in (RATES[0], RATES[-1]) else ""
    contenders = {
        "lopt": make_lopt,
        "AdamW 1e-3": make_adamw(1e-3),
        f"AdamW tuned ({rate:.0e}{at_end})": make_adamw(rate),
    }
    rows = {
        name: [summarize(run(f"{name}, seed {seed}", train, make, seed)) for seed in range(seeds)]
        for name, make in contenders.items()
    }
    print_table(f"{title}; mean over {seeds} seed{'s' * (seeds > 1)}", rows)


def tune(train: Train) -> float:
    """The rate with the lowest train loss at the end of one run; the test split has no say."""
    ends = {rate: run(f"tuning {rate:.0e}", train, make_adamw(rate), TUNING_SEED)[-1]["train loss"] for rate in RATES}
    return min(RATES, key=lambda rate: _rank(ends[rate]))


def summarize(measured: list[Figures]) -> Figures:
    """The figures at the end of a run, and the lowest test loss along it."""
    best = min((figures["test loss"] for figures in measured), key=_rank)
    losses = {"train loss": measured[-1]["train loss"], "test loss": measured[-1]["test loss"], "best test loss": best}
    return losses | measured[-1]


def run(name: str, train: Train, make_optimizer: MakeOptimizer, seed: int) -> list[Figures]:
    start = time.perf_counter()
    measured = train(make_optimizer, seed)
    told = ", ".join(f"{key} {value:#.4g}" for key, value in summarize(measured).items())
    print(f"{name}: {told} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
    return measured


def print_table(title: str, rows: dict[str, list[Figures]]) -> None:
    columns = list(next(iter(rows.values()))[0])
    width = max(map(len, rows))
    print(f"{title}\n\n| {'optimizer':{width}} | {' | '.join(columns)} |")
    print(f"|{'-' * (width + 2)}|{'|'.join('-' * (len(column) + 2) for column in columns)}|")
    for name, runs in rows.items():
        cells = [f"{fmean(figures[column] for figures in runs):#{len(column)}.4g}" for column in columns]
        print(f"| {name:{width}} | {' | '.join(cells)} |")
    print()


def is_due(done: int, total: int) -> bool:
    """Whether to measure after `done` of `total` steps or epochs: ten times, or each time if there are fewer."""
    return done * 10 // total > (done - 1) * 10 // total


def read_options(description: str, arguments: list[str] | None, **lengths: int) -> argparse.Namespace:
    """The options of the command line: `--seeds`, and the length of a run under its name."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in ({"seeds": 3} | lengths).items():
        parser.add_argument(f"--{name}", type=_read_count, default=value, help=f"default: {value}")
    return parser.parse_args(arguments)


def _read_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _rank(loss: float) -> float:
    return loss if isfinite(loss) else inf
