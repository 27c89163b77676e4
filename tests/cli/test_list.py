"""`lopt list tasks`: every family with its size, its horizon and tuned Adam's loss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lopt.cli.commands.list import list_families
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.tuned_adam import load_archive


def find(name: str) -> TaskFamily | None:
    """The family; None where the package that brings its data is missing."""
    try:
        return TASKS[name]()
    except ImportError:
        return None


def test_every_family_is_told_with_what_it_is_its_size_and_its_horizon() -> None:
    told = list_families()
    assert set(told) == set(TASKS)
    for name, entry in told.items():
        assert 20 < len(entry["what"]) <= 120
        if name != "module" and (family := find(name)) is not None:
            assert entry["parameters"] == family.spec.size
            assert entry["horizon"] == family.horizon
            tuned = load_archive().get(name)
            pools = {pool: len(values) for pool, values in family.pools.items()}
            assert entry["pools"] == (pools or None)
            assert entry["tuned_adam"] == (tuned.final if tuned else None)
    assert told["sinusoid"]["pools"] == {"train": 800, "outer_valid": 100, "test": 100}
    assert told["module"]["parameters"] is told["module"]["tuned_adam"] is None


def test_a_family_without_its_data_is_told_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ImportError("no data")

    monkeypatch.setattr(TASKS["mlp"], "__init__", refuse)
    assert list_families()["mlp"]["parameters"] is None


def test_sizes_are_those_of_meta_training_on_a_cpu() -> None:
    sizes = [entry["parameters"] for entry in list_families().values() if entry["parameters"] is not None]
    assert max(sizes) <= 40_000


def test_command_prints_a_table_or_json(run: Callable[..., Any]) -> None:
    told = json.loads(run("list", "tasks", "--json").out)
    assert told == {"tasks": list_families()}
    table = run("list", "tasks").out
    assert all(name in table for name in TASKS)
    assert "parameters" in table
    assert f"{told['tasks']['char_rnn']['parameters']:,}" in table
    sinusoid = table[table.index("sinusoid") : table.index("glyphs")]
    assert re.findall("800|100", sinusoid) == ["800", "100", "100"]
    assert f"{told['tasks']['quadratic']['tuned_adam']:.4g}" in table
