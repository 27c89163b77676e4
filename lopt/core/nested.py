"""Nested dicts by dotted keys, the form in which people name settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def flatten_dict(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys.

    Args:
        tree: with keys that are strings; lists are values.
        prefix: of all keys, with its dot.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_dict(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Where two configurations differ, for messages and tables: such as "a.b 1 -> 2", sorted.

    Args:
        old, new: nested dicts; an entry that one of them lacks counts as None.
        but: dotted keys that may differ.
    """
    before, after = flatten_dict(old), flatten_dict(new)
    keys = sorted(key for key in {*before, *after}.difference(but) if before.get(key) != after.get(key))
    return [f"{key} {before.get(key)!r} -> {after.get(key)!r}" for key in keys]
