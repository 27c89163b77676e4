"""What a step costs beyond its arithmetic: many small tensors, and the guard."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.table import Table
from torch import nn

import lopt
from bench.entries import draw
from bench.memory import measure_allocations
from bench.models import MODELS, Shapes
from bench.setting import make_console
from lopt.rules import RULES

SMALL = (32,)
DEFAULT = ("adamw", "small_fc", "mlp", "celo", "velo", "celo2_base", "hierarchical_rnn", "lstm")
HEAVY = ("lstm", "hierarchical_rnn")  # not guarded by default: seconds per step on 9.5 M parameters

Start = Callable[[dict[str, nn.Parameter]], Callable[[], object]]


def start_rule(params: dict[str, nn.Parameter], name: str, guard: bool = False) -> Callable[[], object]:
    """A rule as constructed by default."""
    optimizer = lopt.LearnedOptimizer(params.items(), RULES[name](), num_steps=1000, guard=guard)
    return partial(optimizer.step, loss=1.0)


def start_adamw(params: dict[str, nn.Parameter]) -> Callable[[], object]:
    """`torch.optim.AdamW(foreach=True)`."""
    return torch.optim.AdamW(params.values(), foreach=True).step


def make_params(shapes: Shapes) -> dict[str, nn.Parameter]:
    """Parameters with gradients."""
    params, _ = draw(shapes, torch.float32, torch.device("cpu"))
    made = {key: nn.Parameter(p) for key, p in zip(shapes, params, strict=True)}
    for p in made.values():
        p.grad = p.detach().clone()
    return made


def measure(starts: Sequence[tuple[Start, Shapes]], repeats: int) -> list[list[float]]:
    """Seconds per step of each, in turns, so that what else the machine does meets all of them."""
    steps = [start(make_params(shapes)) for start, shapes in starts]
    seconds: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        for step, own in zip(steps, seconds, strict=True):
            begin = time.perf_counter()
            step()
            if repeat >= 2:
                own.append(time.perf_counter() - begin)
    return seconds


def count_operations(start: Start, shapes: Shapes) -> int:
    """ATen operations per step."""
    step = start(make_params(shapes))
    step()
    return measure_allocations(step, [], torch.device("cpu"))[1]


def measure_small(name: str, number: int, repeats: int) -> dict[str, Any]:
    """Many small tensors against one tensor of as many elements, and against AdamW."""
    many: Shapes = {f"p{i}": SMALL for i in range(number)}
    one: Shapes = {"p": (number * prod(SMALL),)}
    rule = partial(start_rule, name=name)
    small, whole, adamw = map(statistics.median, measure([(rule, many), (rule, one), (start_adamw, many)], repeats))
    few = {key: many[key] for key in list(many)[: number // 10]}
    return {
        "rule": name,
        "milliseconds": 1e3 * small,
        "arithmetic": 1e3 * whole,
        "overhead": 1e3 * (small - whole),
        "adamw": 1e3 * adamw,
        "overhead_over_adamw": (small - whole) / adamw,
        "operations": count_operations(rule, many),
        "operations_of_a_tenth": count_operations(rule, few),
    }


def measure_guard(name: str, model: str, repeats: int) -> dict[str, Any]:
    """A guarded step against one that is not."""
    starts = [(partial(start_rule, name=name, guard=guard), MODELS[model]) for guard in (False, True)]
    plain, guarded = map(statistics.median, measure(starts, repeats))
    return {"rule": name, "milliseconds": 1e3 * plain, "guarded": 1e3 * guarded, "overhead": guarded / plain - 1}


def make_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Numbers with three digits."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", "\n"), justify="left" if key == "rule" else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


@click.command()
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), help="Repeatable.  [default: eight]")
@click.option("--tensors", default=1000, show_default=True, type=click.IntRange(min=10), help=f"Of shape {SMALL}.")
@click.option("--model", default="mlp", show_default=True, type=click.Choice(list(MODELS)), help="For the guard.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of torch.")
@click.option("--repeats", default=15, show_default=True, type=click.IntRange(min=3))
@click.option("--guard/--no-guard", default=True, show_default=True, help="Measure the guard, too.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def overhead(
    rules: tuple[str, ...], tensors: int, model: str, threads: int, repeats: int, guard: bool, file: Path | None
) -> None:
    """What a step costs beyond its arithmetic: in Python, for many small tensors, and for the guard."""
    torch.set_num_threads(threads)
    rules = rules or DEFAULT
    console = make_console()
    small = [measure_small(name, tensors, repeats) for name in rules]
    console.print(make_table(f"{tensors} tensors of shape {SMALL}, milliseconds per step, CPU", small))
    guarded = (
        [measure_guard(name, model, min(repeats, 7)) for name in rules if name != "adamw" and name not in HEAVY]
        if guard
        else []
    )
    if guarded:
        console.print(make_table(f"guard on model {model!r}, milliseconds per step, CPU", guarded))
    if file is not None:
        setting = {"threads": threads, "torch": torch.__version__, "command": ["python", "-m", "bench", *sys.argv[1:]]}
        content = {"setting": setting, "small": small, "guard": guarded}
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
