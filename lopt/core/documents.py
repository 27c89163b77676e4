"""TOML and JSON that people write and programs leave behind, read with one kind of error.

Text is UTF-8, with or without a byte-order mark, whatever the system's own encoding is. What is nested deeper than any
configuration is refused, before something that calls itself for every level runs out of stack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEPTH = 50
"""Of tables and lists in each other; presets have 4."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ValueError: it is no TOML, not UTF-8, or nested too deeply; the message names the file.
        OSError: it cannot be read.
    """
    tables: dict[str, Any] = _read(path, tomllib.loads, "is not a TOML file")
    return tables


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a program has written.

    Raises:
        ValueError: it is no JSON, no object, not UTF-8, or nested too deeply; the message says that it is damaged.
        OSError: it cannot be read.
    """
    content = _read(path, json.loads, "is damaged")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found {content!r:.60}")
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """The tables in a text.

    Raises:
        ValueError: it is no TOML, or nested too deeply.
    """
    tables: dict[str, Any] = _parse(text, tomllib.loads)
    return tables


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    return _parse(text, json.loads)


def to_json(tree: Any) -> bytes:
    """The bytes of a JSON file that people may read, too: indented, with a newline at its end; the inverse of
    `read_json`.
    """
    return (json.dumps(tree, indent=2) + "\n").encode()


def _read(path: Path, parse: Callable[[str], Any], wrong: str) -> Any:
    # Opened first: what cannot be read is an OSError, which names the file by itself.
    data = path.read_bytes()
    try:
        return _parse(data.decode("utf-8-sig"), parse)
    except ValueError as error:
        raise ValueError(f"{path} {wrong}: {error}") from error


def _parse(text: str, parse: Callable[[str], Any]) -> Any:
    try:
        content = parse(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    _check_depth(content, 0)
    return content


def _check_depth(content: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(content, (Mapping, list)):
        for inner in content.values() if isinstance(content, Mapping) else content:
            _check_depth(inner, depth + 1)
