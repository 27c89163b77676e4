"""The Python of README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lopt
from lopt.optim.learned_optimizer import DEFAULT_RULE

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
DEFAULT = re.compile(r"LearnedOptimizer\((?!.*rule=)")
"""A use of the optimizer without a rule of its own, which loads the default one."""


def test_readme_has_python_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_block_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEFAULT.search(block) and DEFAULT_RULE not in lopt.list_rules():
        pytest.skip(f"the rule {DEFAULT_RULE!r} is not shipped yet")
    monkeypatch.chdir(tmp_path)
    batches = [(torch.rand(5, 64), torch.arange(5))] * 2
    exec(block.replace("steps=200", "steps=2, validation_steps=10"), {"batches": batches})
