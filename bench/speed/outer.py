"""Speed of a preset's outer steps: tasks drawn, the meta-gradient, merging, and the outer optimizer."""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch

from bench import setting
from bench.speed.meta import name_quartiles
from bench.timing import time_calls
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import build_trainer


@click.command()
@click.argument("preset")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Such as task.shots=10; repeatable.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(min=1), help="Outer steps of a repeat.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=3))
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def outer(preset: str, overrides: tuple[str, ...], steps: int, repeats: int, file: Path | None) -> None:
    """Outer steps per CPU-second of PRESET, without validations, logs and checkpoints.

    Other jobs on the machine disturb even these, as they share its caches.
    """
    config = load_config(preset, list(overrides))
    torch.set_num_threads(config.trainer.threads)
    trainer = build_trainer(config)

    def make_steps() -> None:
        for _ in range(steps):
            trainer.train_step()

    make_steps()
    times = time_calls(make_steps, repeats, float("inf"), trainer.device)
    result = name_quartiles("per_cpu_second", [steps / seconds for seconds in times.cpu])
    low, median, high = (result[f"per_cpu_second{end}"] for end in ("_low", "", "_high"))
    click.echo(
        f"{config.name}: {median:.0f} outer steps per CPU-second ({low:.0f} to {high:.0f} in half of the repeats)"
    )
    told = {"preset": config.name, "overrides": list(overrides), "steps": steps, "repeats": repeats}
    told |= {
        "threads": config.trainer.threads,
        "cpus": os.cpu_count(),
        "device": setting.describe_device(trainer.device),
    }
    setting.write_json(file, {"setting": told | setting.list_versions(), "results": result})
