"""Without a GPU, Triton kernels run in its interpreter: to be chosen before triton is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from interpreter import patch_once

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        patch_once()


class Result(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`lopt` with these arguments."""
    from lopt.__main__ import main

    def run_command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["lopt", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run_command
