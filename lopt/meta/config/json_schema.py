"""JSON schema of presets, for editors: completion, types and descriptions while a TOML file is typed.

It is made of the declarations that a preset is checked by: the dataclasses of the configuration, the constructors of
what registries hold, and the docstrings of both.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from lopt.core.schema import INT64, list_options
from lopt.meta.config.run import RunConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.loggers import LOGGERS
from lopt.meta.unroll.horizons import HORIZONS
from lopt.rules import RULES
from lopt.tasks import TASKS, TRANSFORMS

DIALECT = "http://json-schema.org/draft-07/schema#"  # which editors of TOML know
SIMPLE: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -INT64, "maximum": INT64 - 1},
    float: {"type": "number"},
    str: {"type": "string"},
}
NAMED: dict[str, Mapping[str, Any]] = {
    "rule": RULES,
    "task": TASKS,
    "estimator": ESTIMATORS,
    "horizon": HORIZONS,
    "transforms": TRANSFORMS,
    "loggers": LOGGERS,
}
"""Settings that name an entry of a registry, or are lists of such tables."""

DRAWN = {
    "anyOf": [
        {"type": "object", "required": ["choose"], "properties": {"choose": {"type": "array", "minItems": 1}}},
        {"type": "object", "required": ["low", "high"], "properties": {"low": {}, "high": {}, "log": SIMPLE[bool]}},
    ]
}
"""A table in the place of a task's option, from which families are drawn."""


SECTION = r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)"
ENTRY = r"^    (\w[\w, ]*): ((?:.*\n?)(?:^        .*\n?)*)"


def describe_presets() -> dict[str, Any]:
    """The schema of a preset, as plain data."""
    return {"$schema": DIALECT, "title": "A preset of lopt", **_describe_fields(RunConfig, "")}


def _describe_fields(kind: Any, where: str) -> dict[str, Any]:
    """A dataclass: its fields, which are all that it may have."""
    hints, texts, properties = get_type_hints(kind), read_descriptions(kind), {}
    for name in hints:
        place = f"{where}.{name}".lstrip(".")
        own = _describe_named(name, place) if name in NAMED else _describe_type(hints[name], place)
        properties[name] = {"description": texts[name], **own} if name in texts else own
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    return _make_object(properties, [name for name in needed if name != "name"])  # which is that of its file


def _describe_named(name: str, where: str) -> dict[str, Any]:
    """A table of an entry's name and options, or a list of them.

    Without a name a horizon is the constant one, and the estimator of a source is the run's.
    """
    entries = [_describe_entry(entry, kind, name == "task") for entry, kind in NAMED[name].items()]
    if name == "horizon" or where == "source.estimator":
        options = {key: value for entry in entries for key, value in entry["properties"].items() if key != "name"}
        entries.append(_make_object(options, []))
    table = {"type": "object", "anyOf": entries}
    return table if name in ("rule", "task", "estimator", "horizon") else {"type": "array", "items": table}


def _describe_entry(entry: str, constructor: Any, drawn: bool) -> dict[str, Any]:
    texts, lines = read_descriptions(constructor), (constructor.__doc__ or "").strip().splitlines()
    properties: dict[str, Any] = {"name": {"const": entry, "description": lines[0] if lines else entry}}
    for option, kind in list_options(constructor).items():
        own = _describe_type(kind, option)
        own = {"anyOf": [own, *DRAWN["anyOf"]]} if drawn and own.get("type") != "object" else own
        properties[option] = {"description": texts[option], **own} if option in texts else own
    return _make_object(properties, ["name"])


def _describe_type(kind: Any, where: str) -> dict[str, Any]:
    if kind in SIMPLE:
        return dict(SIMPLE[kind])
    if is_dataclass(kind):
        return _describe_fields(kind, where)
    origin, inner = get_origin(kind), [inner for inner in get_args(kind) if inner not in (NoneType, ...)]
    if origin in (list, tuple):
        return {"type": "array", "items": _describe_type(inner[0], where)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _describe_type(inner[1], where)}
    return _describe_type(inner[0], where) if inner else {}  # TOML has no null: what may be None is left out


def _make_object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | {"required": required} if required else made


def read_descriptions(constructor: Any) -> dict[str, str]:
    """What docstrings say of arguments and attributes, by name, in a line; sections "Args" and "Attributes" of a class
    and its bases.
    """
    found: dict[str, str] = {}
    for source in reversed(inspect.getmro(constructor)):
        for section in re.findall(SECTION, inspect.cleandoc(source.__doc__ or ""), re.M):
            for names, text in re.findall(ENTRY, section, re.M):
                found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
