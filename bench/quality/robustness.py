"""`python -m bench robustness`: how a rule holds up where a user's program departs from what it was made for.

Beside it stand the same rule untrained, AdamW as it comes (1e-3) and tuned Adam with a cosine: of five learning rates
sqrt(10) apart the best by final training loss, per program; further ones where the best is at an edge. On the axes of
`lr` it keeps the rate of the usual program, as there a rate that is wrong is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import exp, inf, log
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from bench import setting
from bench.quality.departures import AXES, BASES, Axis, Program
from bench.quality.multiples import draw_multiples
from lopt.cli.console import RUNS
from lopt.cli.suites import count_workers, tell_runs
from lopt.core.names import choose
from lopt.evaluation.judging import open_rule
from lopt.evaluation.settings import read_card
from lopt.evaluation.suites.archive import Archive
from lopt.evaluation.suites.contenders import COSINE, DEFAULT, rate
from lopt.evaluation.suites.runs import Build, Run, Training, train_task
from lopt.evaluation.suites.search import Request
from lopt.meta.runs.lock import hold_folder
from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.rules import RULES, Rule
from lopt.rules.files import fingerprint

GRID, LIMIT = range(-6, -1), 8
"""Exponents of sqrt(10) that are tried, and how far to either side of 1 further ones may go."""
ADAMW_DECAY = 0.01
"""What torch gives AdamW."""
TINY = 1e-30  # losses of 0 count as this

Losses = list[float | None]
"""Per seed; None where not finite."""


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison.

    Attributes:
        title: for readers.
        label: that its runs are archived by.
        prepare: makes the optimizer for a program and a learning rate; processes get it pickled.
        lr: its learning rate; None where it is tuned.
    """

    title: str
    label: str
    prepare: Callable[[Program, float], Build]
    lr: float | None = 1.0


class Job(NamedTuple):
    """A run that is missing."""

    program: Program
    contender: Contender
    lr: float
    seed: int


class Point(NamedTuple):
    """A contender at one setting of an axis.

    Attributes:
        axis, value: the setting.
        contender: its title.
        lr: its learning rate, the axis' factor apart.
        train, validation: final losses.
        train_ratio, validation_ratio: geometric means over seeds of these over tuned Adam's at the usual setting.
    """

    axis: str
    value: Any
    contender: str
    lr: float
    train: Losses
    validation: Losses
    train_ratio: float | None
    validation_ratio: float | None


# -- contenders --------------------------------------------------------------------------------------------------------


def prepare_rule(rule: Rule, program: Program, lr: float) -> Build:
    """A rule as users have it: with names, the length that they tell, and the loss."""

    def build(model: nn.Module, num_steps: int) -> Training:
        planned, decay = round(program.told * num_steps), program.weight_decay
        params = model.named_parameters()
        optimizer = LearnedOptimizer(params, rule, lr * program.lr, weight_decay=decay, num_steps=planned)
        return Training(optimizer, lambda loss: optimizer.step(loss=loss))

    return build


def prepare_adam(schedule: str, decay: float, program: Program, lr: float) -> Build:
    """torch's AdamW, which is Adam where nothing decays.

    Args:
        schedule: "constant" or "cosine" over the steps that it is told, and up again beyond, as torch's is.
        decay: where the program gives none.
    """

    def build(model: nn.Module, num_steps: int) -> Training:
        optimizer = AdamW(model.parameters(), lr * program.lr, weight_decay=program.weight_decay or decay)
        scheduler = CosineAnnealingLR(optimizer, round(program.told * num_steps)) if schedule == COSINE else None

        def step(_: Tensor) -> None:
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

        return Training(optimizer, step)

    return build


def list_contenders(title: str, rule: Rule) -> list[Contender]:
    """The rule, its untrained self, AdamW as it comes; tuned Adam, which all are held against, is the last."""
    name, schedule, lr = DEFAULT
    prior = RULES[rule.name](**rule.config)
    return [
        Contender(title, f"rule {fingerprint(rule)}", partial(prepare_rule, rule)),
        Contender("untrained", f"rule {fingerprint(prior)}", partial(prepare_rule, prior)),
        Contender(f"AdamW {lr:g}", name, partial(prepare_adam, schedule, ADAMW_DECAY), lr),
        Contender("tuned Adam", f"adam {COSINE}", partial(prepare_adam, COSINE, 0.0), None),
    ]


# -- runs --------------------------------------------------------------------------------------------------------------


class Sweep:
    """The runs of contenders on programs, archived as they end.

    Args:
        archive: has what was run before.
        num_seeds: runs of each, on the seeds from 0.
    """

    def __init__(self, archive: Archive, num_seeds: int) -> None:
        self.archive, self.seeds = archive, range(num_seeds)

    def find(self, program: Program, contender: Contender, lr: float) -> list[Run]:
        """The runs that there are, by seed."""
        runs = [self.archive.find(program.task, contender.label, program.options, lr, seed) for seed in self.seeds]
        return [run for run in runs if run is not None]

    def search(self, program: Program, contender: Contender) -> tuple[Program, list[float]]:
        """Where and at which learning rates a contender has to have run before its own is known."""
        usual = replace(program, lr=1.0)
        if contender.lr is not None:
            return usual, []
        low, high = GRID[0], GRID[-1]
        while max(-low, high) < LIMIT:
            rates = [rate(k) for k in range(low, high + 1)]
            if any(len(self.find(usual, contender, lr)) < len(self.seeds) for lr in rates):
                break
            best = self._rank(usual, contender, rates)
            if best not in (rates[0], rates[-1]):
                break
            low, high = low - (best == rates[0]), high + (best == rates[-1])
        return usual, rates

    def choose(self, program: Program, contender: Contender) -> float | None:
        """The learning rate of a contender; None if it has not been tuned yet."""
        if contender.lr is not None:
            return contender.lr
        usual, rates = self.search(program, contender)
        known = all(len(self.find(usual, contender, lr)) == len(self.seeds) for lr in rates)
        return self._rank(usual, contender, rates) if known else None

    def plan(self, programs: Sequence[Program], contenders: Sequence[Contender]) -> list[Job]:
        """What can be run next; [] when nothing is missing."""
        jobs: dict[tuple[Program, str, float, int], Job] = {}
        for program in programs:
            for contender in contenders:
                usual, rates = self.search(program, contender)
                chosen = self.choose(program, contender)
                wanted = [(usual, lr) for lr in rates] + ([] if chosen is None else [(program, chosen)])
                for where, lr in wanted:
                    done = {run.seed for run in self.find(where, contender, lr)}
                    for seed in set(self.seeds) - done:
                        jobs[where, contender.label, lr, seed] = Job(where, contender, lr, seed)
        return list(jobs.values())

    def _rank(self, program: Program, contender: Contender, rates: Sequence[float]) -> float:
        """The best of some rates by final training loss; of equal ones the smallest."""

        def score(lr: float) -> float:
            losses = [run.train for run in self.find(program, contender, lr)]
            return average_ratio(losses, [1.0] * len(losses)) or inf

        return min(rates, key=score)


def execute(job: Job) -> Run:
    """Do a run, in whatever process this is called; its curve is not kept."""
    program, contender = job.program, job.contender
    build = contender.prepare(program, job.lr)
    run = train_task(program.task, job.seed, build, label=contender.label, schedule=program.options, lr=job.lr)
    return replace(run, curve=[])


def carry_out(
    sweep: Sweep,
    programs: Sequence[Program],
    contenders: Sequence[Contender],
    workers: int = 1,
    on_run: Callable[[Request, Run, int], None] | None = None,
) -> None:
    """Do all runs that are missing, in rounds, as the rates of a grid are known only when those before have ended."""
    with _open_map(workers) as each:
        while jobs := sweep.plan(programs, contenders):
            for i, (job, run) in enumerate(zip(jobs, each(execute, jobs), strict=True)):
                task = job.program.task
                sweep.archive.add(task, run)
                if on_run is not None:
                    told = Request(task.name, job.contender.title, job.program.options, job.lr, job.seed)
                    on_run(told, run, len(jobs) - 1 - i)


@contextmanager
def _open_map(workers: int) -> Iterator[Callable[..., Iterator[Run]]]:
    if workers == 1:
        yield map
        return
    # Spawned, as a forked process inherits the threads' locks of torch in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


# -- figures -----------------------------------------------------------------------------------------------------------


def average_ratio(losses: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """The geometric mean of ratios that are paired by seed; None where a loss is not finite."""
    pairs = [(a, b) for a, b in zip(losses, others, strict=True) if a is not None and b is not None]
    if len(pairs) < len(losses):
        return None
    return exp(sum(log(max(a, TINY)) - log(max(b, TINY)) for a, b in pairs) / len(pairs))


def list_points(sweep: Sweep, axes: dict[str, Axis], contenders: Sequence[Contender]) -> list[Point]:
    """All figures, when nothing is missing."""
    points = []
    for name, axis in axes.items():
        _, *usual = _find_losses(sweep, axis.base, contenders[-1])
        for value, program in zip(axis.values, axis.list_programs(), strict=True):
            for contender in contenders:
                lr, train, validation = _find_losses(sweep, program, contender)
                ratios = average_ratio(train, usual[0]), average_ratio(validation, usual[1])
                points.append(Point(name, value, contender.title, lr, train, validation, *ratios))
    return points


def _find_losses(sweep: Sweep, program: Program, contender: Contender) -> tuple[float, Losses, Losses]:
    """The learning rate, and final training and validation losses per seed."""
    lr = sweep.choose(program, contender)
    if lr is None:
        raise ValueError(f"{contender.title} has not been tuned on {program}: carry out the sweep first")
    runs = sweep.find(program, contender, lr)
    return lr, [run.train for run in runs], [run.validation for run in runs]


def compare_settings(points: Sequence[Point], titles: Sequence[str]) -> dict[tuple[str, Any], tuple[float | None, ...]]:
    """Of each setting the first contender's training and validation loss over those of the last one there."""
    found: dict[tuple[str, Any], dict[str, Point]] = {}
    for point in points:
        found.setdefault((point.axis, point.value), {})[point.contender] = point
    return {
        key: (
            average_ratio(there[titles[0]].train, there[titles[-1]].train),
            average_ratio(there[titles[0]].validation, there[titles[-1]].validation),
        )
        for key, there in found.items()
    }


def make_table(points: Sequence[Point], axes: dict[str, Axis], titles: Sequence[str]) -> Table:
    """A row per setting: losses over tuned Adam's at the usual one (marked *), and the rule's over its at each."""
    title = "final losses / tuned Adam's at the usual setting (*); last: the rule's / tuned Adam's at the same setting"
    columns = [f"{which}\n{name}" for which in ("train", "valid.") for name in titles]
    heads = ["axis", "setting", *columns, "Adam's\nrate", "train\nrule/Adam", "valid.\nrule/Adam"]
    table = setting.start_table(title, heads, texts=2)
    ratios = compare_settings(points, titles)
    for (name, value), there in ratios.items():
        own = {point.contender: point for point in points if (point.axis, point.value) == (name, value)}
        usual = value == getattr(axes[name].base, axes[name].trait)
        figures = [own[t].train_ratio for t in titles] + [own[t].validation_ratio for t in titles]
        cells = [*figures, own[titles[-1]].lr, *there]
        table.add_row(name, f"{value}{' *' if usual else ''}", *("-" if x is None else f"{x:.3g}" for x in cells))
    return table


# -- the command -------------------------------------------------------------------------------------------------------


def choose_axes(names: str | None) -> dict[str, Axis]:
    """Those of comma-separated names, or all."""
    try:
        return (
            {key: AXES[key] for key in (choose("axis", n.strip(), AXES) for n in names.split(","))} if names else AXES
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.argument("rule", default="lopt-base")
@click.option("--axes", help=f"Some, comma-separated, of {', '.join(AXES)}.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(min=1), help="Runs of each.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all cores].")
@click.option(
    "--archive", type=click.Path(path_type=Path), default=RUNS / "robustness", show_default=True, help="Keeps runs."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here (PNG).")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def robustness(
    rule: str, axes: str | None, seeds: int, workers: int | None, archive: Path, out: Path | None, file: Path | None
) -> None:
    """Show how RULE holds up where a program departs from what it was made for: a panel for each trait that varies.

    RULE is a shipped name, a rule file or a run's folder. It is told what a user tells it; beside it are the same rule
    untrained, AdamW 1e-3 and Adam with a cosine at the best learning rate for each program. A perceptron on digits is
    varied in batch size, initial scale, random labels, weight decay, bf16 parameters, the num_steps that schedules are
    told, lr, steps and width, a small GPT in the last four. Runs are kept: the command goes on where it was stopped.
    """
    chosen = choose_axes(axes)
    try:
        path, learned, card = open_rule(rule)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    contenders = list_contenders(read_card(card).name or path.stem, learned)
    console = setting.make_console()
    archive.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(Archive(archive, " ".join(setting.list_command())), seeds)
    programs = list(dict.fromkeys(p for axis in chosen.values() for p in (axis.base, *axis.list_programs())))
    with hold_folder(archive), tell_runs("robustness", console) as on_run:
        carry_out(sweep, programs, contenders, count_workers(workers), on_run)
    points = list_points(sweep, chosen, contenders)
    titles = [contender.title for contender in contenders]
    console.print(make_table(points, chosen, titles))
    content = {
        "rule": learned.describe(),
        "seeds": seeds,
        "programs": {name: asdict(program) for name, program in BASES.items()},
        "versions": setting.list_versions(),
        "points": [point._asdict() for point in points],
    }
    setting.write_json(file, content)
    if out is not None:
        out.write_bytes(draw_multiples(points, chosen, titles))
