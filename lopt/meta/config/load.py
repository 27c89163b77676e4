"""Where a run's configuration comes from: shipped presets, TOML files, and overrides on the command line.

A file becomes nested dicts, overrides are put into these, and only the result is checked against `RunConfig`: an
override may name any entry, whether or not the preset has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt.core.documents import parse_toml, read_toml
from lopt.core.names import suggest
from lopt.core.schema import conform
from lopt.meta.config.run import RunConfig

PRESETS = Path(__file__).parent / "presets"


def list_presets() -> dict[str, str]:
    """The shipped presets that `load_config` knows by name, in alphabetical order, and what each is for in a line.

    A preset that does not say what it is for has an empty line.
    """
    descriptions = {}
    for path in sorted(PRESETS.glob("*.toml")):
        descriptions[path.stem] = str(read_toml(path).get("description", ""))
    return descriptions


def load_config(preset: str, overrides: list[str] | None = None) -> RunConfig:
    """The configuration that a user asks for, from a preset's name or a TOML file's path, checked as a whole.

    Args:
        preset: a shipped name comes before a file of that name; a file ends in `.toml`.
        overrides: TOML lines such as `trainer.steps=100` or `rule.name="lstm"`; a bare word is taken as a string.
    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not TOML, or unknown or ill-typed entries.
    """
    path = PRESETS / f"{preset}.toml"
    if not os.path.isfile(path):  # false for what no file system takes as a name, too
        path = Path(preset)
        if path.suffix != ".toml":
            raise ValueError(f"no preset is called {preset!r}. {suggest(preset, list_presets())}; or give a .toml file")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {preset}")
    raw = read_toml(path)
    raw.setdefault("name", path.stem)
    # The last one wins, as on any command line.
    for override in overrides or []:
        merge(raw, parse_override(override))
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from nested dicts: of TOML, of a run folder's `config.json`, or of a rule file's card.

    Whole numbers pass as floats. Registries are not looked up yet: names of tasks and rules, and their options, are
    checked where they are built.

    Raises:
        ValueError: an entry is missing, unknown, of the wrong type or out of range.
    """
    config: RunConfig = conform(raw, RunConfig, "")
    return config


def parse_override(text: str) -> dict[str, Any]:
    """What a user types after `--set`, `a.b=value`, as nested dicts ready for `merge`.

    The value is read as TOML; what is no TOML, such as a bare word, is taken as a string.

    Raises:
        ValueError: not of that form.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip() or "\n" in text:
        raise ValueError(f"an override looks like trainer.steps=100, got {text!r}")
    # A shell eats quotes: `rule.name=lstm` is what people type.
    for written in (value, _quote(value.strip())):
        try:
            return parse_toml(f"{key} = {written}")
        except ValueError:
            continue
    raise ValueError(f"an override looks like trainer.steps=100, got {text!r}")


def _quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def merge(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put nested `changes` into `target`, in place: tables are joined entry by entry, other values replaced.

    A list counts as one value: `--set` replaces it whole.
    """
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value
