"""Where a run's configuration comes from: shipped presets, TOML files, and overrides on the command line.

A file becomes nested dicts, overrides are put into these, and only the result is checked against `RunConfig`: an
override may name any entry, whether or not the preset has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt.core.documents import read_toml
from lopt.core.names import suggest
from lopt.core.schema import conform
from lopt.meta.config.effect import check_effect
from lopt.meta.config.overrides import apply_changes, parse_override
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
        overrides: texts such as `trainer.steps=100`; see `lopt.meta.config.overrides`.
    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not TOML, unknown or ill-typed entries, or settings without effect.
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
    apply_changes(raw, [parse_override(text) for text in overrides or []])
    config = parse_config(raw)
    check_effect(config, raw)
    return config


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from nested dicts: of TOML, of a run folder's `config.json`, or of a rule file's card.

    Whole numbers pass as floats. Registries are not looked up yet: names of tasks and rules, and their options, are
    checked where they are built.

    Raises:
        ValueError: an entry is missing, unknown, of the wrong type or out of range.
    """
    config: RunConfig = conform(raw, RunConfig, "")
    return config
