"""Damaged inputs are refused as documented, or usable: a sample, 60 seconds in the slow suite, `make fuzz` for more.

`FUZZ_SECONDS` and `FUZZ_SEED` say how long and from where; a failure names the seed of its input.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz_mutators import Check
from fuzz_targets import TARGETS

SECONDS, SEED = float(os.environ.get("FUZZ_SECONDS", "60")), os.environ.get("FUZZ_SEED", "0")
SAMPLE = 30
SLOWEST, MOST_MEMORY = 10.0, 1 << 20  # seconds of one input; kilobytes beyond what there was at first

each_target = pytest.mark.parametrize("name", TARGETS)


def fuzz(name: str, make: Callable[[Path], Check], folder: Path, until: float, most: int | None = None) -> str:
    """Inputs until a time, or so many of them; what became of them in a line."""
    check, accepted, count, begin = make(folder), 0, 0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.perf_counter() < until and count != most:
        seed = f"{SEED}/{name}/{count}"
        started = time.process_time()
        try:
            accepted += check(Random(seed))
        except Exception as error:
            raise AssertionError(f"input {seed!r} in {folder}: {type(error).__name__}: {str(error)[:500]}") from error
        assert time.process_time() - started < SLOWEST, f"input {seed!r} took {time.process_time() - started:.1f} s"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY, f"input {seed!r} takes memory"
        count += 1
    minutes = (time.perf_counter() - begin) / 60
    return (
        f"{name}: {count} inputs, {count / max(minutes, 1e-9):,.0f} a minute, {accepted / max(count, 1):.0%} accepted"
    )


@each_target
def test_a_sample_of_damaged_inputs_is_refused_or_usable(name: str, tmp_path: Path) -> None:
    fuzz(name, TARGETS[name], tmp_path, time.perf_counter() + 600, SAMPLE)


@pytest.mark.slow
@each_target
def test_damaged_inputs_are_refused_or_usable(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = fuzz(name, TARGETS[name], tmp_path, time.perf_counter() + SECONDS / len(TARGETS))
    with capsys.disabled():
        print(f"\n{told}")  # noqa: T201
