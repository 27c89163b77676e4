"""`bench molecules`: what it refuses before anything is computed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from bench.quality.molecules import molecules


@pytest.mark.parametrize("tasks", [2, 21])
def test_tasks_that_do_not_divide_or_are_too_few_are_refused(tasks: int) -> None:
    result = CliRunner().invoke(molecules, ["--tasks", str(tasks)])
    assert result.exit_code == 2
    assert f"expected 0, or a multiple of 2 from 20 on, found {tasks}" in result.output
