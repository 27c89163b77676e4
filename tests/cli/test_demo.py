"""The part of `lopt demo` that trains nothing: live in a terminal, in plain lines elsewhere, and once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lopt.cli.commands.demo import PICTURE, show_shipped
from lopt.evaluation.suites import showcase
from lopt.evaluation.suites.runs import Run


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One program, and what is trained of it: nothing, in two steps."""
    made: list[str] = []

    def pretend(task: Any, seed: int, build: Any, *, on_step: Any, **options: Any) -> Run:
        made.append(task.name)
        for step in (1, 2):
            on_step(step, 0.75 / step)
        given = {"validation": 0.5, "accuracy": None, "diverged": False, "step_ms": 1.0, "seconds": 1.0}
        return Run(seed=seed, train=0.125, curve=[0.75, 0.375, 0.125], **options, **given)

    monkeypatch.setattr(showcase, "train_task", pretend)
    monkeypatch.setattr(showcase, "SHOWN", {"diabetes_table": "Table"})
    monkeypatch.setattr("lopt.cli.commands.demo.REFRESH", 0.0)
    return made


@pytest.mark.parametrize("terminal", [True, False])
def test_a_rule_is_shown_at_work_and_its_runs_are_kept(made: list[str], tmp_path: Path, terminal: bool) -> None:
    for again in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        show_shipped(tmp_path, console)
        told = console.file.getvalue()  # type: ignore[attr-defined]
        assert "0.125 (0.5)" in told
        assert "lower training loss than AdamW as it comes on 1 of 1" in told
        assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
        assert ("1/600: 0.75" in told) is (terminal and not again)
        assert made == ["diabetes_table"]
