"""Foreign data against type annotations: what TOML or JSON holds, checked and made into dataclasses.

A configuration is declared once, as dataclasses with types; a wrong value is refused by the name it has in the file,
before anything is built with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lopt.core.foreign_text import make_printable
from lopt.core.names import suggest

PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
INT64 = 2**63


def conform(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, for what comes from a file or a command line and must be of a declared type.

    Whole numbers pass as floats; true and false are no numbers; numbers are finite and integers fit 64 bits.

    Args:
        value: what TOML or JSON made of the file.
        kind: a dataclass, one of `PLAIN`, `list[X]`, `tuple[X, ...]`, `dict[str, X]`, `X | None` or Any.
        where: what the value is called, such as `trainer.steps`; "" for the whole.
    Returns:
        An instance of `kind`, built from the inside out, so that dataclasses check themselves in `__post_init__`.
    Raises:
        ValueError: it is something else, lacks an entry or has an unknown one, or is text with control characters.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _conform_fields(value, kind, where)
    if origin in (Union, UnionType):
        return None if value is None else conform(value, inner[0], where)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(conform(element, inner[0], f"{where}[{i}]") for i, element in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: conform(entry, inner[1], f"{where}.{key}") for key, entry in value.items()}
    # Exact types: a bool is an int to Python, and nobody means it so. Floats are bounded to leave out infinity and NaN.
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is str and type(value) is str and not value.isprintable():
        raise ValueError(f"{where} must be text without control characters, got {make_printable(repr(value))}")
    if type(value) is kind and (kind is not int or -INT64 <= value < INT64) and kind is not float:
        return value
    raise ValueError(f"{make_printable(where)} must be {_describe(kind)}, got {make_printable(repr(value))}")


def _conform_fields(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or 'the whole'} must be a table of named entries, got {make_printable(repr(value))}")
    hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"{prefix}{make_printable(key)} is unknown. {suggest(key, hints)}")
    for declared in fields(kind):
        if declared.name not in value and declared.default is MISSING and declared.default_factory is MISSING:
            raise ValueError(f"{prefix}{declared.name} is missing")
    return kind(**{key: conform(entry, hints[key], f"{prefix}{key}") for key, entry in value.items()})


def list_options(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Which options of a class a configuration may set: the constructor's arguments that TOML and JSON can hold.

    Args:
        constructor: a class, with type annotations.
    Returns:
        Types by name, in the order of the signature; arguments of other types, such as functions, are left out.
    """
    # A dataclass has its annotations where its fields are, maybe in a base class from another module.
    hints = get_type_hints(constructor if is_dataclass(constructor) else constructor.__init__)
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = [name for name, p in signature(constructor).parameters.items() if p.kind in named]
    return {name: hints[name] for name in names if _is_plain(hints.get(name))}


def _is_plain(kind: Any) -> bool:
    if get_origin(kind) is dict:
        return True
    if get_origin(kind) in (list, tuple, Union, UnionType):
        return all(_is_plain(inner) for inner in get_args(kind) if inner not in (NoneType, ...))
    return kind in PLAIN


def _describe(kind: Any) -> str:
    """How people call a type."""
    if get_origin(kind) in (list, tuple):
        return "a list"
    return PLAIN.get(kind, "a table of named entries")
