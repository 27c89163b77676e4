"""What a learned start is, parameter by parameter: its size, the rates that it goes on with, and how far tasks move it.

`lopt inspect` prints it as a table. That tasks move the last layer far and the others hardly is what Raghu et al. 2019,
arXiv 1909.09157, call feature reuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from lopt.evaluation.settings import read_card
from lopt.evaluation.statistics import keep_finite
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import LearnedInit
from lopt.rules.building_blocks.low_rank import measure_mixing
from lopt.rules.files import find_longest_run
from lopt.tasks import TaskFamily

if TYPE_CHECKING:
    from rich.console import Console

TASKS_MOVED = 100


class ParameterFacts(TypedDict):
    """What there is to say about a parameter; None where it has no such thing.

    Attributes:
        shape: of one.
        size: root mean square of where it starts.
        rate, lowest, highest: factor on an element's step, mean and range; with matrices what an element's own step
            counts for in it.
        negative: share of elements whose factor is below 0.
        mixed: share of the squares in the matrices' product that is of other elements' steps.
        moves: root mean square of a task's way, over all elements and tasks, relative to `size`.
    """

    shape: list[int]
    size: float
    rate: float | None
    lowest: float | None
    highest: float | None
    negative: float | None
    mixed: float | None
    moves: float | None


@torch.no_grad()
def describe_start(rule: LearnedInit, family: TaskFamily | None = None, steps: int = 1) -> dict[str, ParameterFacts]:
    """Every parameter of the rule's model, by name in its order.

    Args:
        family: on whose tasks of the pool "test" the ways are measured; None leaves them out.
        steps: of adaptation.
    """
    moves = {} if family is None else measure_moves(rule, family, steps)
    return {name: _describe(rule, name, start, moves.get(name)) for name, start in rule.initial_params.items()}


def measure_moves(rule: LearnedInit, family: TaskFamily, steps: int, tasks: int = TASKS_MOVED) -> dict[str, float]:
    """How far adaptation moves each parameter: root mean square of the ways of all tasks.

    Args:
        family: of the rule's model.
        tasks: of the pool "test".
    Returns:
        By name; not finite where tasks diverge.
    """
    loop = InnerLoop(rule, family, 0, horizon=steps, pool="test")
    with torch.no_grad():
        window = loop.unroll(loop.start(torch.arange(tasks)), steps, restart=False)
        ends, starts = family.spec.unflatten(window.slots.params), rule.initial_params
        return {name: _measure(ends[name] - start) for name, start in starts.items()}


def find_family(card: Mapping[str, Any]) -> tuple[TaskFamily | None, int]:
    """The family that a rule was trained on first, and the steps of adaptation there, if its card tells.

    Args:
        card: of the rule; None is found without a configuration, or where this installation lacks the data.
    """
    config, steps = read_card(card).config, find_longest_run(card) or 1
    try:
        return (None if config is None else config.list_families()[0].build_task()), steps
    except (ImportError, OSError):
        return None, steps


def print_start(facts: Mapping[str, ParameterFacts], steps: int, console: Console) -> None:
    """Print what `describe_start` found as a table, a row for each parameter.

    Args:
        steps: of adaptation.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title="where it starts", title_justify="left", box=None, pad_edge=False)
    for heading in ("parameter", "shape", "size", "rate", "range", "below 0", "mixed", f"moves in {steps}"):
        table.add_column(heading, justify="left" if heading == "parameter" else "right")
    for name, one in facts.items():
        ends = [_write(one["lowest"]), _write(one["highest"])]
        span = "-" if one["lowest"] is None else " to ".join(ends)
        cells = [f"{one['size']:.3g}", _write(one["rate"]), span, _share(one["negative"]), _share(one["mixed"])]
        table.add_row(*map(Text, (name, "x".join(map(str, one["shape"])), *cells, _share(one["moves"]))))
    console.print(table, "")


def _describe(rule: LearnedInit, name: str, start: Tensor, moved: float | None) -> ParameterFacts:
    factors, mixed = _read_factors(rule, name)
    size, known = _measure(start), factors.numel() > 0
    return {
        "shape": list(start.shape),
        "size": size,
        "rate": float(factors.mean()) if known else None,
        "lowest": float(factors.min()) if known else None,
        "highest": float(factors.max()) if known else None,
        "negative": float((factors < 0).double().mean()) if known else None,
        "mixed": mixed,
        "moves": None if moved is None or not size else keep_finite(moved / size),
    }


def _read_factors(rule: LearnedInit, name: str) -> tuple[Tensor, float | None]:
    """The factors on an element's own step, flat, and the share of the squares that is of other elements' steps."""
    rates = rule.list_rates(name)
    if rule.scaling == "low_rank" and rates:
        factor, read, write = rates
        return measure_mixing(factor, read, write, [rule.list_rates(other)[1] for other in rule.adapted])
    if rule.scaling != "matrix" or not rates:
        return (rates[0].flatten() if rates else torch.empty(0, dtype=torch.float32)), None
    own = torch.ones(1, dtype=torch.float32)
    for matrix in rates:
        own = (own[:, None] * matrix.diagonal()).flatten()
    whole = prod(float(matrix.square().sum()) for matrix in rates)
    return own, 1 - float(own.square().sum()) / whole if whole else 0.0


def _measure(x: Tensor) -> float:
    """Root mean square; 0 of no elements."""
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _write(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}" if 0 < value < 0.01 else f"{value:.0%}"
