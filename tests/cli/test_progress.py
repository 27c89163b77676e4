"""Plain progress, where there is no terminal: what a line says, when it comes, and that long commands have it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from training_cases import TINY

from lopt.cli.sweep.study import Report
from lopt.cli.sweep.sweep import Sweep
from lopt.meta.runs import progress
from lopt.meta.runs.progress import PlainProgress


def make_console(**options: Any) -> Console:
    return Console(file=io.StringIO(), **options)


def test_a_line_tells_the_share_the_place_and_the_time_left_at_the_speed_so_far() -> None:
    now = 1000.0
    plain = PlainProgress(make_console(), "meta-training", done=0.5, clock=lambda: now)
    assert plain.describe() == "meta-training: 50%, 0:00:00 so far, time left unknown"
    now += 600
    plain.update(0.6, "step 60/100")
    # A tenth of the whole took 600 s: the four tenths that are left take 2400 s.
    assert plain.describe() == "meta-training: 60% (step 60/100), 0:10:00 so far, about 0:40:00 left"
    now += 3000
    plain.update(1.0, "step 100/100")
    assert plain.describe() == "meta-training: 100% (step 100/100), 1:00:00 so far, about 0:00:00 left"


def wait_for(file: io.StringIO, lines: int) -> None:
    end = time.monotonic() + 10
    while file.getvalue().count("\n") < lines and time.monotonic() < end:
        time.sleep(0.005)


def test_a_line_comes_every_period_even_during_one_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PERIOD", 0.01)
    file = io.StringIO()
    with PlainProgress(make_console(), "judging", file=file):
        wait_for(file, 3)
    told = file.getvalue().count("\n")
    assert told >= 3
    time.sleep(0.05)
    assert file.getvalue().count("\n") <= told + 1  # none after the end


@pytest.mark.parametrize("options", [{"force_terminal": True}, {"quiet": True}])
def test_terminals_and_quiet_consoles_get_no_plain_lines(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setattr(progress, "PERIOD", 0.001)
    file = io.StringIO()
    with PlainProgress(make_console(**options), "judging", file=file):
        time.sleep(0.05)
    assert file.getvalue() == ""


def test_training_and_judging_tell_their_progress_on_the_standard_error(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "PERIOD", 0.002)
    Path("t.toml").write_text(TINY + "[evaluation]\nseeds = 2\nsteps = [3]\n")
    result = run("train", "t.toml", "--json", "--set", "trainer.steps=12")
    assert result.status == 0, result.err
    told = [line for line in result.err.splitlines() if " so far, " in line]
    assert any(line.startswith("meta-training: ") and "/12)" in line and " left" in line for line in told)
    assert any(line.startswith("judging: ") and "tuning adam" in line for line in told)
    assert " so far, " not in result.out


def test_the_progress_of_a_sweep_counts_the_steps_of_trials_that_run_and_all_of_those_that_ended(
    tmp_path: Path,
) -> None:
    ended = [Report("a", "done", {}, 100, 0.5, ""), Report("b", "pruned", {}, 20, 0.9, "")]
    reports = [*ended, Report("c", "running", {}, 40, 0.7, "")]
    study: Any = SimpleNamespace(folder=tmp_path, steps=100, plan={"trials": 4}, list_reports=lambda: reports)
    assert Sweep(study).measure_progress() == (240 / 400, "2 of 4 trials ended")
