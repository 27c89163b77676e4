"""What tuned Adam reaches on every family whose data are embedded: the archive that meta-losses are normalised by."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.table import Table

from bench.setting import list_versions, make_console, start_table
from lopt.core.files import write_atomic
from lopt.evaluation.baselines import FORMAT, Tuning, tune_baseline
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.tuned_adam import ARCHIVE, COMMAND, TunedAdam

OPTIMIZER, SCHEDULE, CRITERION = "adam", "constant", "final"
EMBEDDED = [name for name in TASKS if name != "module"]
TUNING = Tuning(schedules=(SCHEDULE,))
STREAM = "levels"
POINTS, DIGITS = 20, 6
FEWEST, MOST, NUMBERS = 32, 4096, 2**18


def count_seeds(family: TaskFamily) -> int:
    """How many tasks a curve is averaged over: more where they are small and cheap, as their losses are far apart.

    From `FEWEST` to `MOST`, as many as have `NUMBERS` parameters together.
    """
    return min(MOST, max(FEWEST, NUMBERS // family.spec.size))


def measure_adam(family: TaskFamily, tuning: Tuning = TUNING) -> TunedAdam:
    """Tune Adam's learning rate on `family`, and train other tasks with it: an entry of the archive.

    Args:
        family: with its default options, where the entry is to be archived.
        tuning: tasks and grid that the learning rate is tuned on.
    Raises:
        ValueError: no learning rate is stable, or that of the tuning tasks is not on the others.
    """
    count, horizon = count_seeds(family), family.horizon
    lr = tune_baseline(OPTIMIZER, SCHEDULE, family, horizon, tuning).best[CRITERION]
    if lr is None:
        raise ValueError(f"no learning rate of Adam is stable on {family.describe()}")
    rule = RULES[OPTIMIZER](lr=lr, schedule=SCHEDULE)
    curves = run_curves(rule, family, torch.arange(count), horizon, seed=tuning.seed, stream=STREAM)
    if bool(curves.diverged.any()):
        raise ValueError(
            f"Adam with lr={lr} is stable on {tuning.count_seeds(family)} tuning tasks of {family.describe()}, but "
            f"{int(curves.diverged.sum())} of {count} others diverged: tune it on more tasks"
        )
    # Curves are straightest in logarithms: points are spaced in those, and losses averaged in them where they can be.
    steps = np.unique(np.geomspace(1, horizon, POINTS).round().astype(int))
    losses = curves.losses[torch.from_numpy(np.concatenate([[0], steps]))].double()
    positive = bool((losses > 0).all())
    first, *averaged = losses.log().mean(1).exp() if positive else losses.mean(1)
    return TunedAdam(
        config=family.config,
        horizon=horizon,
        lr=lr,
        tuning_seeds=tuning.count_seeds(family),
        num_seeds=count,
        first=_round(first),
        final=_round(curves.final.double().mean()),
        mean=_round(curves.mean.double().mean()),
        average="geometric" if positive else "arithmetic",
        steps=steps.tolist(),
        losses=[_round(loss) for loss in averaged],
        versions={key: version for key, version in list_versions().items() if key in ("lopt", "torch", "python")},
    )


def write_archive(file: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Write the archive, a family a line, in the order of `TASKS`, so that a change of one is a change of a line.

    Args:
        file: replaced as a whole, or not at all.
        entries: by the families' names.
    """
    head = {
        "command": COMMAND,
        "optimizer": f"{OPTIMIZER}, {SCHEDULE} learning rate with the lowest {CRITERION} loss",
        "tuning": asdict(TUNING) | {"format": FORMAT},
    }
    lines = [f"  {json.dumps(name)}: {_write(entries[name])}" for name in TASKS if name in entries]
    top = [f" {json.dumps(key)}: {_write(value)}" for key, value in head.items()]
    text = ",\n".join([*top, ' "families": {\n' + ",\n".join(lines) + "\n }"])
    write_atomic(file, f"{{\n{text}\n}}\n".encode())


def _write(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _round(value: torch.Tensor) -> float:
    return float(f"{float(value):.{DIGITS}g}")


@click.command()
@click.option("--family", "families", type=click.Choice(EMBEDDED), multiple=True, help="Repeatable; all by default.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=ARCHIVE, help="The archive.")
def levels(families: tuple[str, ...], out: Path) -> None:
    """Tune Adam on every family with its default options and archive what it reaches.

    With --family the archive's other entries stay.
    """
    torch.set_num_threads(1)
    console = make_console()
    entries: dict[str, dict[str, Any]] = json.loads(out.read_text())["families"] if out.exists() and families else {}
    began = time.process_time()
    for name in families or EMBEDDED:
        start = time.process_time()
        entries[name] = asdict(measure_adam(TASKS[name]()))
        console.print(f"{name}: {time.process_time() - start:.0f} CPU seconds")
    write_archive(out, entries)
    console.print(_tabulate(entries), f"{time.process_time() - began:.0f} CPU seconds in all, written to {out}")


def _tabulate(entries: Mapping[str, dict[str, Any]]) -> Table:
    columns = ("horizon", "lr", "first", "final", "mean")
    seeds = ("tuning_seeds", "num_seeds")
    table = start_table("tuned Adam", ("family", *columns, "tuned on", "tasks"))
    for name, entry in entries.items():
        table.add_row(name, *(f"{entry[key]:.4g}" for key in columns), *(str(entry[key]) for key in seeds))
    return table
