"""What `lopt list` tells: names of what there is, with a line or a table row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import lopt

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("shipped", "presets", "rules", "tasks", "estimators")


def list_contents(kind: str | None) -> dict[str, Mapping[str, Any]]:
    """Entries by name, of one of `KINDS` or all: a line each, or a dict of columns."""
    from lopt.cli.commands.catalogue import list_families
    from lopt.meta.config.run import list_presets
    from lopt.meta.estimators import ESTIMATORS
    from lopt.rules import RULES

    def first_lines(registry: Mapping[str, Any]) -> dict[str, str]:
        return {key: (cls.__doc__ or "").strip().splitlines()[0] for key, cls in registry.items()}

    contents: dict[str, Callable[[], Mapping[str, Any]]] = {
        "shipped": lambda: {name: lopt.load_card(name).get("description", "") for name in lopt.list_rules()},
        "presets": list_presets,
        "rules": lambda: first_lines(RULES),
        "tasks": list_families,
        "estimators": lambda: first_lines(ESTIMATORS),
    }
    return {key: contents[key]() for key in ([kind] if kind else KINDS)}


def print_contents(contents: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """A table of each kind."""
    from rich.markup import escape
    from rich.table import Table

    for title, entries in contents.items():
        told = {name: entry if isinstance(entry, dict) else {"": entry} for name, entry in entries.items()}
        columns = list(next(iter(told.values()), {}))
        table = Table(title=title, title_justify="left", show_header=any(columns), box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="left" if column in ("", "what") else "right")
        for name, entry in told.items():
            table.add_row(escape(name), *(escape(_write_cell(entry[column])) for column in columns))
        console.print(table, "")


def _write_cell(value: object) -> str:
    """A text as it is, a count with commas, four digits of another number, `-` for what is not known."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
