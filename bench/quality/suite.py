"""`python -m bench suite`: tune the contenders of a suite and run what they were tuned to, into the package's archive.

What is archived is not run again, and every run is on disk as it ends: the command may be stopped and given again.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import click

from bench import setting
from lopt.cli.suites import count_workers, tell_runs
from lopt.evaluation.suites import SUITES
from lopt.evaluation.suites.archive import TUNED
from lopt.evaluation.suites.contenders import CONTENDERS
from lopt.evaluation.suites.tuning import tune_suite
from lopt.evaluation.suites.work import read_share
from lopt.meta.runs.lock import hold_folder


@click.command()
@click.argument("name", metavar="SUITE", type=click.Choice(sorted(SUITES)))
@click.option("--tasks", help="Some of the suite's, comma-separated.")
@click.option("--contenders", help=f"Comma-separated; by default all: {', '.join(CONTENDERS)}.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Judged runs of each.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: all cores].")
@click.option("--archive", type=click.Path(path_type=Path), default=TUNED, help="Where runs are kept.")
def suite(name: str, tasks: str | None, contenders: str | None, seeds: int, workers: int | None, archive: Path) -> None:
    """Tune optimizers from libraries on SUITE and keep their judged runs, to hold rules against.

    For optimizers at one rate for all tasks tune `development` first.
    """
    console = setting.make_console()
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    folder, share = archive / name, read_share()
    folder.mkdir(parents=True, exist_ok=True)
    alone = hold_folder(folder) if share.rank == 0 else nullcontext()
    with alone, tell_runs(f"tuning on {name}", console) as on_run:
        tune_suite(
            name,
            tasks=tasks.split(",") if tasks else None,
            contenders=contenders.split(",") if contenders else None,
            num_seeds=seeds,
            folder=archive,
            workers=count_workers(workers),
            share=share,
            on_run=on_run,
            command=command,
        )
