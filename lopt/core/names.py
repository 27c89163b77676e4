"""Names that users write: a value that must be one of a few, and what an unknown one may have meant.

Every error about an unknown name lists the known ones and suggests those that are spelt nearly like it.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

from lopt.core.foreign_text import make_printable

Value = TypeVar("Value")

MAX_NAME = 200  # characters; what is longer is nearly like nothing


def choose(name: str, value: Value, known: Iterable[Value]) -> Value:
    """Check an option that has few possible values, at the boundary where a user's value comes in.

    Args:
        name: the option, as the user writes it.
        value: what was given, of any type.
        known: the values that there are, in the order in which an error lists them.
    Returns:
        `value` itself.
    Raises:
        ValueError: it is none of them; the message lists them and suggests those that are spelt nearly like it.
    """
    values = list(known)
    if value in values:
        return value
    near = _find_near(value, map(str, values))
    hint = f". Did you mean {near}?" if near else ""
    raise ValueError(
        f"{name} must be one of {', '.join(map(str, values)) or 'none'}, got {make_printable(repr(value))}{hint}"
    )


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name, for callers who say themselves what the name is of.

    Args:
        name: what was given.
        known: the names that there are; an error lists them sorted.
    Returns:
        Such as "Did you mean adam? Known: adam, lstm, sgd", without the question if none is spelt nearly like it.
    """
    names = sorted(known)
    near = _find_near(name, names)
    question = f"Did you mean {near}? " if near else ""
    return f"{question}Known: {', '.join(names) or 'none'}"


def _find_near(name: object, known: Iterable[str]) -> str:
    """Up to three known names that are spelt nearly like `name`: "adam or adamw"; "" if there is none."""
    return " or ".join(get_close_matches(str(name)[:MAX_NAME], list(known), n=3))
