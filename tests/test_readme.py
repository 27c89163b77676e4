"""The Python of README.md runs as it stands, and the page stays short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pages import ROOT, find_code

README = ROOT / "README.md"
BLOCKS = find_code(README, "python")


def test_readme_has_python_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_block_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batches = [(torch.rand(5, 64), torch.arange(5))] * 2
    exec(block.replace("steps=200", "steps=2, validation_steps=10"), {"batches": batches})


def test_readme_fits_on_two_screens() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 130
