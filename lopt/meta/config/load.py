"""Where a run's configuration comes from: shipped presets, TOML files, and overrides on the command line.

A file becomes nested dicts, overrides are put into these, and only the result is checked against `RunConfig`: an
override may name any entry, whether or not the preset has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from lopt.core.documents import read_toml
from lopt.core.names import suggest
from lopt.core.schema import conform
from lopt.meta.config.effect import check_effect
from lopt.meta.config.overrides import Change, apply_changes, complete, parse_override
from lopt.meta.config.run import RunConfig

PRESETS = Path(__file__).parent / "presets"

Preset = str | os.PathLike[str] | Mapping[str, Any] | RunConfig


def list_presets() -> dict[str, str]:
    """The shipped presets that `load_config` knows by name, in alphabetical order, and what each is for in a line.

    A preset that does not say what it is for has an empty line.
    """
    descriptions = {}
    for path in sorted(PRESETS.glob("*.toml")):
        descriptions[path.stem] = str(read_toml(path).get("description", ""))
    return descriptions


def load_config(preset: Preset, overrides: Sequence[str | Change] = ()) -> RunConfig:
    """The configuration that a user asks for, from a preset, a file or what is like one, checked as a whole.

    Args:
        preset: a shipped name, or the path of a file that ends in `.toml`, which comes after a preset of that name;
            nested dicts as in such a file; or a configuration.
        overrides: texts such as `trainer.steps=100`, or keys with values; see `lopt.meta.config.overrides`.
    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not TOML, unknown or ill-typed entries, or settings without effect.
    """
    changes = [parse_override(change) if isinstance(change, str) else change for change in overrides]
    if isinstance(preset, RunConfig):
        raw = {key: value for key, value in preset.to_dict().items() if value is not None}
    elif isinstance(preset, Mapping):
        raw = {"name": "unnamed"} | deepcopy(dict(preset))
    else:
        raw = _read_preset(os.fspath(preset))
    apply_changes(raw, changes)
    config, given = parse_config(raw), raw
    if isinstance(preset, RunConfig):  # all defaults are written out in it, which may be without effect
        given = {}
        apply_changes(given, [(complete(path, raw["task"]), value) for path, value in changes])
    check_effect(config, given)
    return config


def _read_preset(preset: str) -> dict[str, Any]:
    path = PRESETS / f"{preset}.toml"
    if not os.path.isfile(path):  # false for what no file system takes as a name, too
        path = Path(preset)
        if path.suffix != ".toml":
            raise ValueError(f"no preset is called {preset!r}. {suggest(preset, list_presets())}; or give a .toml file")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {preset}")
    return {"name": path.stem} | read_toml(path)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from nested dicts: of TOML, of a run folder's `config.json`, or of a rule file's card.

    Whole numbers pass as floats. Registries are not looked up yet: names of tasks and rules, and their options, are
    checked where they are built.

    Raises:
        ValueError: an entry is missing, unknown, of the wrong type or out of range.
    """
    config: RunConfig = conform(raw, RunConfig, "")
    return config
