"""`lopt sweep`: meta-train with several settings, each a run of its own, and keep the best rule or the mean of all.

The trials, their processes and the folder are the affair of `lopt.cli.sweep`; here are the options and what is printed.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

import lopt
from lopt.cli.console import RUNS
from lopt.core.installation import advise
from lopt.core.printing import say

if TYPE_CHECKING:
    from lopt.cli.sweep.study import Report
    from lopt.cli.sweep.sweep import Sweep

EXAMPLES = """
\b
Examples:
  lopt sweep digits-lstm --vary trainer.learning_rate=1e-3,3e-3,1e-2 --vary rule.hidden=10,20
  lopt sweep mixture --vary trainer.learning_rate=1e-4:1e-2:log --vary estimator.sigma=0.003:0.1:log --trials 16
  lopt sweep mixture --vary trainer.learning_rate=1e-4:1e-2:log --trials 32 --pruner asha
  lopt sweep lopt-base --vary trainer.seed=0,1,2 --average
  lopt sweep --resume runs/sweep-mixture        (also while it runs, from another machine that shares the folder)
  optuna-dashboard runs/sweep-mixture/journal.log

Every trial is a run of its own, which `lopt report` and TensorBoard show. The best one is that with the best
validation, which flatters it: `lopt eval` judges its rule on other tasks.
"""


@click.command(name="sweep", short_help="Meta-train with several settings; keep the best rule.", epilog=EXAMPLES)
@click.argument("preset", required=False)
@click.option("--resume", type=click.Path(path_type=Path), metavar="SWEEP", help="Go on with this sweep, or join it.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the sweep [default: runs/sweep-PRESET].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of all trials.")
@click.option("--vary", multiple=True, metavar="KEY=A,B,C", help="Try these values, or KEY=LOW:HIGH[:log]; repeatable.")
@click.option("--trials", type=click.IntRange(min=1), help="How many trials [default: all combinations].")
@click.option("--sampler", default="", metavar="NAME", help="tpe, random or grid [default: tpe with --trials].")
@click.option("--pruner", default="", metavar="NAME", help="End poor trials early: asha or hyperband.")
@click.option("--first-rung", default=0, metavar="STEPS", help="No trial ends before it [default: a ninth of a run].")
@click.option("--average", is_flag=True, help="Keep the mean of all trials' rules, not the best one.")
@click.option("--workers", type=click.IntRange(min=1), help="Trials at a time, one thread each [default: all cores].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sweep_settings(
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    trials: int | None,
    sampler: str,
    pruner: str,
    first_rung: int,
    average: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Meta-train a rule from PRESET or a TOML file with several settings; keep the one that validates best."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(f"sweeps are made with Optuna: {advise('sweep')}") from error
    from lopt.cli.sweep.sweep import resume_sweep, start_sweep
    from lopt.meta.config.load import load_config
    from lopt.meta.runs.folder import slugify

    if resume is not None and (
        preset or out or overrides or vary or trials or sampler or pruner or first_rung or average
    ):
        raise click.UsageError("--resume takes its settings from the sweep; give nothing else but --workers")
    if resume is not None:
        sweep = resume_sweep(resume)
    elif preset is None:
        raise click.UsageError("give a PRESET or --resume SWEEP; `lopt list presets` shows the presets")
    else:
        if any(text.replace(" ", "").startswith("trainer.threads=") for text in overrides):
            raise click.UsageError(
                "every trial of a sweep has one thread: choose how many run at a time with --workers"
            )
        config = load_config(preset, list(overrides))
        folder = out or RUNS / slugify(f"sweep {config.name}")
        options: Any = {"trials": trials, "sampler": sampler, "pruner": pruner or "none", "first_rung": first_rung}
        sweep = start_sweep(config, vary, folder, **options, average=average)
    best = run_sweep(sweep, workers or os.cpu_count() or 1, Console(stderr=as_json))
    if as_json:
        click.echo(sweep.describe(best))


def run_sweep(sweep: Sweep, workers: int, console: Console) -> Report:
    """Run a sweep to its end, with a line for every trial that ends and a table of all of them at last; returns the
    best one.

    On a signal the running trials are saved, the console says how to go on, and the process exits with status 130.

    Args:
        sweep: new, or resumed from its folder.
        workers: processes at a time; no more are started than there are trials.
        console: for people.
    """
    from lopt.cli.sweep.sweep import print_trials
    from lopt.meta.runs.progress import PlainProgress
    from lopt.meta.trainer.best import UNTRAINED
    from lopt.meta.trainer.checkpoint import RULE
    from lopt.meta.trainer.trainer import Interrupted

    plan, folder = sweep.study.plan, sweep.folder
    workers = min(workers, plan["trials"])
    say(console, f"{plan['trials']} trials, {workers} at a time, in {folder} (optuna-dashboard {folder}/journal.log)")

    def tell(report: Report) -> None:
        settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
        outcome = f"FAILED: {report.error}" if report.status == "failed" else f"{report.status}, best {report.best}"
        say(console, f"{report.name} ({settings}): step {report.step}, {outcome}")
        plain.update(*sweep.measure_progress())

    plain = PlainProgress(console, "sweep", sweep.measure_progress()[0])
    try:
        with plain:
            best = sweep.run(workers, tell)
    except Interrupted:
        say(console, f"stopped and saved; go on with: {shlex.join(['lopt', 'sweep', '--resume', str(sweep.folder)])}")
        sys.exit(130)
    reports = sweep.study.list_reports()
    print_trials(reports, best, plan["config"]["trainer"]["validation_metric"], console)
    elsewhere = sum(report.status == "running" for report in reports)
    if elsewhere:
        say(console, f"note: {elsewhere} trials still run in other processes, the last of which keeps the rule")
    kept = "the mean of all that came to a rule" if plan["average"] else f"the best one is {best.name}"
    say(console, f"{kept}: {sweep.rule_path}")
    if not lopt.load_card(folder / best.name / RULE)["training"]["improved"]:
        say(console, f"note: {UNTRAINED}")
    return best
