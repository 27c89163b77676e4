"""`lopt list`: what rules, presets, tasks, suites, estimators and loggers there are, a line or a row for each.

What it says comes from docstrings, presets, training cards and built tasks: nothing is listed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lopt

KINDS = ("shipped", "starts", "portfolio", "presets", "rules", "tasks", "suites", "estimators", "loggers")


@click.command(name="list", short_help="List rules, presets, tasks, suites, estimators and loggers.")
@click.argument("what", type=click.Choice(KINDS), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_kinds(what: str | None, as_json: bool) -> None:
    """List shipped rules, presets, and what rules, tasks, suites, estimators and loggers there are."""
    contents = list_contents(what)
    if as_json:
        click.echo(json.dumps(contents))
    else:
        print_contents(contents, Console())


def list_contents(kind: str | None) -> dict[str, Mapping[str, Any]]:
    """All that can be named in a configuration or a command, collected from the registries and the shipped files.

    Args:
        kind: one of `KINDS`, or None for all of them.
    Returns:
        For each kind its entries by name: a line of text, or a dict of columns.
    """
    from lopt.meta.config.load import list_presets
    from lopt.meta.estimators import ESTIMATORS
    from lopt.meta.loggers import LOGGERS
    from lopt.rules import RULES

    def first_lines(registry: Mapping[str, Any]) -> dict[str, str]:
        return {key: (cls.__doc__ or "").strip().splitlines()[0] for key, cls in registry.items()}

    contents: dict[str, Callable[[], Mapping[str, Any]]] = {
        "shipped": lambda: {name: lopt.load_card(name).get("description", "") for name in lopt.list_rules()},
        "starts": lambda: {name: lopt.load_card(name).get("description", "") for name in lopt.list_starts()},
        "portfolio": lambda: {str(i): one.describe() for i, one in enumerate(lopt.load_portfolio().settings, start=1)},
        "presets": list_presets,
        "rules": lambda: first_lines(RULES),
        "tasks": list_families,
        "suites": list_programs,
        "estimators": lambda: first_lines(ESTIMATORS),
        "loggers": lambda: first_lines(LOGGERS),
    }
    return {key: contents[key]() for key in ([kind] if kind else KINDS)}


class FamilyFacts(TypedDict):
    """What there is to say about a family with its default options; None where it has none.

    Attributes:
        what: the first line of its file.
        parameters: of one task.
        horizon: steps that a task is meant to be trained for.
        pools: how many parts of its data, such as users, the tasks for training, choosing and judging are made of;
            None where there is no end of tasks.
        tuned_adam: mean loss that Adam with a tuned learning rate reaches in them, from `lopt.tasks.tuned_adam`.
    """

    what: str
    parameters: int | None
    horizon: int | None
    pools: dict[str, int] | None
    tuned_adam: float | None


def list_families() -> dict[str, FamilyFacts]:
    """Every family of `TASKS` by name, to choose one by its size and by what is reached on it.

    Builds them all, which reads their data. Families whose data this installation lacks, and `module`, which has no
    defaults, have no numbers.
    """
    from lopt.tasks import TASKS

    return {name: _describe_family(name, cls) for name, cls in TASKS.items()}


def list_programs() -> dict[str, dict[str, str | int]]:
    """Every program of the suites by name, with what is trained, its suite, and the steps of a run."""
    from lopt.evaluation.suites import SUITES

    programs = ((suite, task) for suite, tasks in SUITES.items() for task in tasks)
    return {t.name: {"what": t.title, "suite": suite, "steps": t.num_steps} for suite, t in programs}


def _describe_family(name: str, cls: Callable[[], Any]) -> FamilyFacts:
    what = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
    unknown: FamilyFacts = {"what": what, "parameters": None, "horizon": None, "pools": None, "tuned_adam": None}
    if name == "module":
        return unknown
    try:
        family = cls()
    except ImportError:
        return unknown
    final = None if family.baseline is None else family.baseline.final
    pools = {pool: len(values) for pool, values in family.pools.items()} or None
    size, horizon = family.spec.size, family.horizon
    return {"what": what, "parameters": size, "horizon": horizon, "pools": pools, "tuned_adam": final}


def print_contents(contents: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a table of each kind, headed by its name; entries that are a line of text have one column without a title.

    Args:
        contents: from `list_contents`.
        console: whose width the tables take.
    """
    for title, entries in contents.items():
        rows = {name: entry if isinstance(entry, dict) else {"": entry} for name, entry in entries.items()}
        columns = list(next(iter(rows.values()), {}))
        table = Table(title=title, title_justify="left", show_header=any(columns), box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="left" if column in ("", "what") else "right")
        for name, entry in rows.items():
            table.add_row(escape(name), *(escape(_write_cell(entry[column])) for column in columns))
        console.print(table, "")


def _write_cell(value: object) -> str:
    """A text as it is, a count with commas, four digits of another number, `-` for what is not known; several of them
    below each other.
    """
    if isinstance(value, dict):
        return "\n".join(map(_write_cell, value.values()))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
