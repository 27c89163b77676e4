"""How meta-training scales with processes: the same tasks, shared out by `torchrun`, one thread each."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from bench import setting
from bench.speed.meta import name_quartiles
from lopt.meta.loggers.json_lines import read_metrics

RUN = """
description = "small_fc on digits by PES"
[task]
name = "mlp"
width = 32
activation = "relu"
batch_size = 64
[rule]
name = "small_fc"
hidden = 4
[estimator]
name = "pes"
num_steps = 20
[trainer]
tasks = 128
threads = 1
validate_every = 1000000
validation_tasks = 1
validation_steps = 1
checkpoint_every = 1000000
"""
WARM_UP = 3  # outer steps that do not count


def train(processes: int, steps: int, overrides: Sequence[str]) -> list[float]:
    """Inner updates per second, all processes together, of each of `steps` outer steps after the warm-up.

    Raises:
        click.ClickException: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scaling.toml").write_text(RUN)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "lopt", "train", "scaling.toml", "--no-eval", "--out", "run"]
        for override in (*overrides, f"trainer.steps={steps + WARM_UP}"):
            command += ["--set", override]
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("lopt: error: ")]
            raise click.ClickException(f"{processes} processes: {told[0] if told else done.stderr[-1000:]}")
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    return [line["inner_steps_per_second"] for line in lines if line["kind"] == "train"][WARM_UP:]


def summarize(speeds: dict[int, list[float]]) -> dict[int, dict[str, float]]:
    """Medians and quartiles, of the speeds and of their ratios to the first number of processes, step by step."""
    base = next(iter(speeds.values()))
    return {
        processes: name_quartiles("per_second", own)
        | name_quartiles("ratio", [a / b for a, b in zip(own, base, strict=True)])
        | {"ratio_of_medians": statistics.median(own) / statistics.median(base)}
        for processes, own in speeds.items()
    }


def make_table(results: dict[int, dict[str, float]]) -> Table:
    """One row per number of processes."""
    heads = ["processes", "inner updates/s", "quartiles", "ratio", "quartiles of the ratio"]
    table = setting.start_table("inner updates (a step of one task each) per second of wall clock", heads)
    for processes, r in results.items():
        table.add_row(
            str(processes),
            f"{r['per_second']:.0f}",
            f"{r['per_second_low']:.0f} - {r['per_second_high']:.0f}",
            f"{r['ratio_of_medians']:.2f} x",
            f"{r['ratio_low']:.2f} - {r['ratio_high']:.2f}",
        )
    return table


@click.command()
@click.option("--processes", default=(1, 2), show_default=True, multiple=True, type=click.IntRange(min=1))
@click.option("--steps", default=10, show_default=True, type=click.IntRange(min=2), help="Outer steps of a run.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs of each, in turns.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as trainer.tasks=64; repeatable.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def scaling(processes: tuple[int, ...], steps: int, rounds: int, overrides: tuple[str, ...], file: Path | None) -> None:
    """Inner updates per second with 1, 2, ... processes of one thread, which share the same 128 tasks.

    On a machine that others use, too, the ratio means nothing.
    """
    speeds: dict[int, list[float]] = {number: [] for number in processes}
    for _ in range(rounds):
        for number in speeds:
            speeds[number] += train(number, steps, overrides)
    told: dict[str, Any] = {
        "run": "small_fc (hidden 4) on digits (MLP 64-32-10, batch 64), PES, K = 20, 128 tasks",
        "changes": ", ".join(overrides) or "none",
        "outer steps": f"{rounds} x {steps}",
        "device": setting.describe_device(torch.device("cpu")),
    } | setting.list_versions()
    results = summarize(speeds)
    console = setting.make_console()
    setting.print_setting(console, told)
    console.print(make_table(results))
    setting.write_json(file, {"setting": told, "results": {str(number): own for number, own in results.items()}})
