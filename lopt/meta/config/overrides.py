"""What `--set KEY=VALUE` means, everywhere: settings that are changed on top of a file's.

    trainer.steps=100           the value takes the place of what is there, a table that of a whole table
    rule.hidden=16              an option of the entry that the section names
    rule.name=celo              another entry: the options of the one before are dropped, as they were its own
    rule='{name="celo"}'        a whole section
    rule=celo                   short for it
    width=40                    no section is called so: an option of the task, short for task.width=40

The value is read as TOML; what is no TOML, such as a bare word, is a string. Of the same key the last one wins. Whole
sections and names come first, wherever they stand: options belong to the entry that is left then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lopt.core.documents import parse_toml
from lopt.core.foreign_text import make_printable
from lopt.core.names import suggest
from lopt.core.schema import list_options
from lopt.meta.config.run import RunConfig
from lopt.tasks import TASKS

NAMED = {"rule": None, "task": None, "estimator": None, "horizon": "constant"}
"""Sections that name an entry of a registry, and the one that they mean without a name."""

SECTIONS = tuple(declared.name for declared in fields(RunConfig))

Change = tuple[tuple[str, ...], Any]
"""A key, part by part, and its value."""


def parse_override(text: str) -> Change:
    """What a user types after `--set`.

    Raises:
        ValueError: it is not of the form `a.b=value`.
    """
    key, separator, value = text.partition("=")
    if separator and "\n" not in text:
        # A shell eats quotes: `rule.name=lstm` is what people type.
        for written in (value, _quote(value.strip())):
            try:
                # The key by itself: with its value `a.b = 1` and `a = {b = 1}` would look alike.
                return _list_parts(parse_toml(f"{key} = 0")), parse_toml(f"x = {written}")["x"]
            except ValueError:
                continue
    raise ValueError(f"an override looks like trainer.steps=100, got {text!r}")


def list_changes(settings: Mapping[str, Any]) -> list[Change]:
    """What Python's keyword arguments mean, as changes.

    Args:
        settings: by section, a dict with what changes in it; by other keys, with or without dots, their values.
    """
    changes: list[Change] = []
    for key, value in settings.items():
        if key in SECTIONS and isinstance(value, Mapping):
            changes += [((key, option), inner) for option, inner in value.items()]
        else:
            changes.append((tuple(key.split(".")), value))
    return changes


def apply_changes(raw: dict[str, Any], changes: Sequence[Change]) -> None:
    """Change nested settings in place.

    Args:
        raw: sections by name, as a file holds them; it may have some only.
    Raises:
        ValueError: a key is neither a setting of a run nor an option of its task, or leads through something else than
            a table.
    """
    names = [change for change in changes if _is_choice(change[0])]
    for path, value in names:
        _choose(raw, path, value)
    for path, value in changes:
        if not _is_choice(path):
            put_value(raw, complete(path, raw.get("task")), value)


def complete(path: tuple[str, ...], task: Any) -> tuple[str, ...]:
    """The whole key of what may be short for an option of the task.

    Args:
        task: the section, for the names of its options.
    Raises:
        ValueError: the key is neither a setting nor such an option.
    """
    if len(path) > 1 or path[0] in SECTIONS:
        return path
    name = task.get("name") if isinstance(task, Mapping) else None
    options = list_options(TASKS[name]) if name in TASKS else None
    # Without a task to look at, whoever reads the whole says what is wrong with it.
    if options is not None and path[0] not in options:
        known = {*SECTIONS, *options}
        raise ValueError(
            f"{make_printable(path[0])} is unknown: neither a setting of a run nor an option of task {name!r}. "
            f"{suggest(path[0], known)}"
        )
    return ("task", *path)


def put_value(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Put a value at a place in nested dicts, whatever was there; tables on the way are made.

    Raises:
        ValueError: something on the way is no table.
    """
    for i, part in enumerate(path[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[: i + 1])} is no table of named entries, but {tree!r}")
    tree[path[-1]] = value


def _is_choice(path: tuple[str, ...]) -> bool:
    """Whether a key chooses a whole section or the entry of one."""
    return (
        (len(path) == 1 and path[0] in SECTIONS)
        or (len(path) == 2 and path[0] in NAMED and path[1] == "name")
        or path == ("imitation", "teacher")
    )


def _choose(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    section = path[0]
    if path == ("imitation", "teacher"):
        table = raw.setdefault(section, {})
        if isinstance(table, dict) and table.get("teacher") != value:
            table.pop("options", None)
        put_value(raw, path, value)
    elif section not in NAMED or (len(path) == 1 and not isinstance(value, str)):
        put_value(raw, path, value)
    else:
        table = raw.get(section)
        if not isinstance(table, dict) or len(path) == 1 or table.get("name", NAMED[section]) != value:
            raw[section] = {"name": value}


def _list_parts(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The only key of nested tables, part by part."""
    ((part, rest),) = tree.items()
    return (part, *_list_parts(rest)) if isinstance(rest, Mapping) else (part,)


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
