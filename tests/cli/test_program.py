"""The program as a process: what it imports, interrupts, closed pipes, poor terminals, numbers that are too large."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt.meta.runs.memory import explain_memory

TINY = """
[task]
name = "mlp"
width = 3
[rule]
name = "linear"
[estimator]
name = "truncated"
num_steps = 2
[trainer]
steps = 2
tasks = 2
validation_tasks = 2
validation_steps = 2
threads = 1
[evaluation]
seeds = 2
steps = [2]
"""
# Runs `lopt` after a line of preparation, and tells on which heavy modules that took.
MAIN = """
import sys
{prepare}
from lopt.__main__ import main
try:
    main()
finally:
    print("heavy:", *sorted({{"torch", "numpy", "matplotlib"}} & set(sys.modules)), file=sys.stderr)
"""


def launch(*arguments: str, prepare: str = "", shell: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", MAIN.format(prepare=prepare), *arguments]
    if shell:
        command = ["bash", "-c", shell, "bash", *command]
    return subprocess.run(command, capture_output=True, env=os.environ | env, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--version"], 0), (["train", "--help"], 0), (["trian"], 2), (["train", "--hlep"], 2)],
)
def test_help_version_and_usage_errors_import_nothing_heavy(arguments: list[str], status: int) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (status, "heavy:")
    assert b"Traceback" not in done.stderr


def test_completion_imports_nothing_heavy() -> None:
    done = launch(prepare="sys.argv[0] = 'lopt'", _LOPT_COMPLETE="bash_complete", COMP_WORDS="lopt tr", COMP_CWORD="1")
    assert done.stdout == b"plain,train\n"
    assert done.stderr == b"heavy:\n"


def test_nothing_is_imported_before_an_interrupt_is_caught() -> None:
    code = "import sys; before = set(sys.modules); import lopt.__main__; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["__future__", "lopt", "lopt.__main__"]


INTERRUPT = """
class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            import os, signal
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
"""


@pytest.mark.parametrize("name", ["click", "rich", "torch", "lopt.meta.runs.folder"])
def test_an_interrupt_during_imports_ends_in_silence(name: str) -> None:
    done = launch("train", "nothing", prepare=INTERRUPT.format(name=name))
    assert done.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both
    assert done.stdout == b""
    assert done.stderr.decode().strip().removeprefix("heavy:").split() in ([], ["numpy"], ["torch"], ["numpy", "torch"])


@pytest.mark.parametrize("arguments", [["--help"], pytest.param(["list", "presets"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("shell", ['"$@" | true', '"$@" >&-', '"$@" > /dev/full'], ids=["pipe", "closed", "full"])
def test_output_that_nobody_takes_ends_without_a_traceback(arguments: list[str], shell: str) -> None:
    done = launch(*arguments, shell=shell)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith(b"heavy")]) <= 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_any_name(encoding: str) -> None:
    done = launch("ä→\udcff", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert b"Error: No such command '" in done.stderr
    assert b"Traceback" not in done.stderr


# -- numbers that are too large ----------------------------------------------------------------------------------------

HUGE = 2**63 - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"task.width={HUGE}", f"width must be from 1 to 100000.*{HUGE}"),
        ("task.depth=1000000000", "depth from 0 to 1000.*1000000000"),
        ("task.batch_size=1000000000000", "not enough memory.*largest settings are task.batch_size = 1000000000000"),
        (f"task.batch_size={HUGE}", f"too large|not enough memory.*task.batch_size = {HUGE}"),
        ("trainer.tasks=1000000000", "takes at least .* GiB.*largest settings are trainer.tasks = 1000000000"),
        (f"trainer.tasks={HUGE}", f"takes at least .* GiB.*trainer.tasks = {HUGE}"),
        ("trainer.validation_tasks=1000000000", "takes at least .* GiB.*trainer.validation_tasks = 1000000000"),
        ("estimator.num_steps=10000000000", "takes at least .* GiB.*estimator.num_steps = 10000000000"),
        ("evaluation.seeds=10000000000", "takes at least .* GiB.*evaluation.seeds = 10000000000"),
    ],
)
def test_numbers_that_no_machine_holds_are_refused_before_anything_is_made(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TINY)
    result = run("train", "t.toml", "--no-eval", "--set", change)
    assert result.status == 2
    (line,) = result.err.strip().splitlines()
    assert re.search(words, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.toml"]


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda: torch.empty(2**60), r"not enough memory \(.*allocate.*\): the largest settings are task.width = 4096"),
        (lambda: torch.empty(2**62, 64), r"a number is too large \(.*overflow.*\): the largest.*task.width = 4096"),
        (lambda: bytearray(2**62), r"not enough memory \(MemoryError\): the largest.* are task.width = 4096; lower"),
        (lambda: torch.ones(2).add_(torch.ones(2), alpha=1e300), "a number is too large.*task.width = 4096"),
    ],
)
def test_want_of_memory_names_the_largest_settings(fail: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words), explain_memory({"task": {"width": 4096}, "seed": 10**9, "depth": 2}):
        fail()


def test_other_errors_pass_an_explanation_of_memory_by() -> None:
    with pytest.raises(RuntimeError, match=r"^broken$"), explain_memory({}):
        raise RuntimeError("broken")
