"""`lopt demo`: the shipped rule on three programs at once, without any training; then a rule of one's own, in minutes.

First what users have most of: a shipped rule in ordinary training loops, beside AdamW. Then the steps of `lopt train`,
`lopt eval` and `lopt.LearnedOptimizer`, small. A demo that is stopped goes on where it was.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from lopt.cli.console import ARCHIVE, judge_run, make_folder, run_trainer
from lopt.core.printing import say

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lopt.meta.config.run import RunConfig
    from lopt.meta.trainer.trainer import Trainer

DEFAULT_OUT = Path("runs") / "demo"
PICTURE = "first.png"
STEPS = 200
ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
REFRESH = 0.1
"""Seconds between two looks of the live table."""


@click.command(name="demo", short_help="See a shipped rule work, then train one, in minutes.")
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_OUT, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of the preset `demo`.")
def run_demo(out: Path, overrides: tuple[str, ...]) -> None:
    """Watch the shipped rule train three programs beside AdamW; then train a rule of your own, judge it, and use it.

    Some minutes on two cores. Stop it at any time: the same command goes on.
    """
    again = shlex.join(["lopt", "demo", *([] if out == DEFAULT_OUT else ["--out", str(out)])])
    console = Console()
    say(console, f"This takes some minutes; stop it at any time (Ctrl-C), `{again}` goes on.")
    import torch  # once something is to be read

    torch.set_num_threads(1)  # what is trained here is so small that a second thread costs more than it gives
    with ExitStack() as held:
        config, trainer = _open_run(out, overrides, held, console)
        make_folder(ARCHIVE)
        console.print("\n[bold]1. Nothing to train:[/] a shipped rule on three programs that it has not seen")
        try:
            show_shipped(out, console)
        except KeyboardInterrupt:
            say(console, f"stopped; go on with: {again}")
            sys.exit(130)
        console.print("\n[bold]2. Now train your own:[/] an LSTM learns to train small networks on digits")
        run_trainer(trainer, console, again=again)
        console.print("\n[bold]3. Judge it,[/] on networks that it has not seen, against tuned baselines")
        judge_run(config, trainer, console, again=again)
    console.print("\n[bold]4. Use it:[/] another network (64-40-40-10 ReLU), twice the steps, one line changed")
    for line in train_classifier(trainer.rule_path):
        say(console, f"   {line}")
    say(console, f'\n   opt = lopt.LearnedOptimizer(model.parameters(), rule="{trainer.rule_path}")')
    say(
        console,
        "\nNext: `lopt list presets`, `lopt train PRESET`, `lopt eval RULE`; from Python lopt.train, lopt.evaluate",
    )


def _open_run(out: Path, overrides: tuple[str, ...], held: ExitStack, console: Console) -> tuple[RunConfig, Trainer]:
    """The run of the demo, new or gone on with: what is wrong with it is said before anything is shown."""
    from lopt.meta.config.load import load_config
    from lopt.meta.runs.folder import CONFIG, resume_run, start_run

    if not (out / CONFIG).exists():
        config = load_config("demo", list(overrides))
        return config, start_run(config, out, held=held)
    if overrides:
        raise click.UsageError(f"{out} holds a run already: remove the folder, give another --out or no --set")
    config, trainer = resume_run(out, held=held)
    say(console, f"going on with the run in {out} (remove the folder to start afresh)")
    return config, trainer


def show_shipped(folder: Path, console: Console) -> None:
    """Train three programs with the default rule, live, and print and draw what it reaches beside AdamW.

    Args:
        folder: gets the runs and the picture; runs that are there are not made again.
    Raises:
        OSError: the folder cannot be written.
    """
    from rich.live import Live

    from lopt.core.files import write_atomic
    from lopt.evaluation.report.showcase import build_showcase_table, draw_showcase, state_showcase
    from lopt.evaluation.suites.showcase import Shown, list_recorded, show_rule
    from lopt.evaluation.suites.task import SuiteTask
    from lopt.meta.runs.progress import PlainProgress
    from lopt.optim.learned_optimizer import DEFAULT_RULE
    from lopt.rules.files import load

    shown: list[Shown] = []
    told = 0.0
    with ExitStack() as live:
        plain = live.enter_context(PlainProgress(console, DEFAULT_RULE))
        with console.status("reading the data"):
            recorded = list_recorded()
        table = build_showcase_table(DEFAULT_RULE, recorded, shown)
        screen = live.enter_context(Live(table, console=console, auto_refresh=False)) if console.is_terminal else None

        def tell(task: SuiteTask, step: int, loss: float) -> None:
            nonlocal told
            plain.update((len(shown) + step / task.num_steps) / len(recorded), f"{task.name}, step {step}: {loss:.3g}")
            if screen is not None and time.monotonic() - told > REFRESH:
                told = time.monotonic()
                running = f"{step}/{task.num_steps}: {loss:.3g}"
                screen.update(build_showcase_table(DEFAULT_RULE, recorded, shown, running), refresh=True)

        for one in show_rule(DEFAULT_RULE, load(DEFAULT_RULE), folder / "programs", tell):
            shown.append(one)
            if screen is not None:
                screen.update(build_showcase_table(DEFAULT_RULE, recorded, shown), refresh=True)
    if screen is None:
        console.print(build_showcase_table(DEFAULT_RULE, recorded, shown))
    say(console, "In brackets: held-out accuracy, or loss. AdamW's runs are recorded, the rule's are made here.")
    say(console, state_showcase(shown, DEFAULT_RULE))
    write_atomic(folder / PICTURE, draw_showcase(shown, DEFAULT_RULE).to_png())
    say(console, f"\n   opt = lopt.LearnedOptimizer(model.parameters(), num_steps=...)\n   picture: {folder / PICTURE}")


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
