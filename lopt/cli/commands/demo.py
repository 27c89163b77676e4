"""`lopt demo`: train a rule, judge it, and use it in an ordinary PyTorch loop in which one line changes.

The same three steps that a user takes with `lopt train`, `lopt eval` and `lopt.LearnedOptimizer`, small enough for some
minutes on two cores. A demo that is stopped goes on where it was.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lopt.cli.console import ARCHIVE, judge_run, make_folder, run_trainer, say

if TYPE_CHECKING:
    from torch.optim import Optimizer

STEPS = 200
ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@click.command(name="demo", short_help="Train, judge and use a rule, in minutes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs") / "demo", show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the preset `demo`.")
def run_demo(out: Path, overrides: tuple[str, ...]) -> None:
    """Watch an LSTM learn to train a network on real images, judge it, and use it: some minutes on two cores."""
    from lopt.meta.config.load import load_config
    from lopt.meta.runs.folder import CONFIG, resume_run, start_run

    console = Console()
    with ExitStack() as held:
        if (out / CONFIG).exists():
            if overrides:
                raise click.UsageError(f"{out} holds a run already: remove the folder, give another --out or no --set")
            config, trainer = resume_run(out, held=held)
            say(console, f"going on with the run in {out} (remove the folder to start afresh)")
        else:
            config = load_config("demo", list(overrides))
            trainer = start_run(config, out, held=held)
        make_folder(ARCHIVE)
        console.print("[bold]1. Meta-training:[/] an LSTM learns to train small networks on digits")
        run_trainer(trainer, console)
        console.print("\n[bold]2. Judging:[/] the learned rule against baselines with tuned learning rates")
        judge_run(config, trainer, console)
    console.print("\n[bold]3. Using it:[/] another network (64-40-40-10 ReLU), twice the steps, one line changed")
    for line in train_classifier(trainer.rule_path):
        say(console, f"   {line}")
    say(console, f'\n   opt = lopt.LearnedOptimizer(model.parameters(), rule="{trainer.rule_path}")')


def train_classifier(rule: str | os.PathLike[str]) -> Iterator[str]:
    """Train a 64-40-40-10 ReLU network on the digits with the rule in a file, the shipped rule and Adam.

    Adam is shown with its default learning rate and with the best of `ADAM_RATES` for the train loss, which is what a
    user without a learned rule would have to search for.

    Returns:
        A line of text for each optimizer, with its train loss and test accuracy, as soon as it has run.
    """
    import torch

    from lopt.optim.learned_optimizer import DEFAULT_RULE, LearnedOptimizer

    yield _describe("LearnedOptimizer, this rule", *_fit(lambda params: LearnedOptimizer(params, rule=rule)))
    yield _describe(
        f"LearnedOptimizer, {DEFAULT_RULE}", *_fit(lambda params: LearnedOptimizer(params, num_steps=STEPS))
    )
    runs = {lr: _fit(lambda params, lr=lr: torch.optim.Adam(params, lr=lr)) for lr in ADAM_RATES}
    yield _describe(f"Adam, its default {ADAM_RATES[0]}", *runs[ADAM_RATES[0]])
    best = min(runs, key=lambda lr: runs[lr][0])
    yield _describe(f"Adam, best of {len(runs)} rates: {best}", *runs[best])


def _describe(name: str, loss: float, accuracy: float) -> str:
    return f"{name:<31} train loss {loss:.2g}, test accuracy {accuracy:.1%}"


def _fit(build: Callable[..., Optimizer]) -> tuple[float, float]:
    """Final loss on the train split and accuracy on the test split."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from lopt.core.random import make_generator
    from lopt.optim.learned_optimizer import LearnedOptimizer
    from lopt.tasks.data.splits import load_digits

    # The same weights for every optimizer, without touching the random state of the process.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    optimizer = build(model.parameters())
    digits = load_digits()
    x, y = digits["train"]
    generator = make_generator(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this run goes beyond")  # on purpose, and the demo says so
        for _ in range(STEPS):
            index = torch.randint(len(x), (128,), generator=generator)
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            if isinstance(optimizer, LearnedOptimizer):
                optimizer.step(loss=loss)
            else:
                optimizer.step()
    with torch.no_grad():
        held_x, held_y = digits["test"]
        accuracy = (model(held_x).argmax(-1) == held_y).float().mean()
        return float(F.cross_entropy(model(x), y)), float(accuracy)
