"""No module needs what only POSIX, or only Linux, has: that is refused in a process that imports them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

ABSENT = (
    *("fcntl", "grp", "posix_ipc", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"),
    "triton",  # of Linux on x86-64 alone
)
IMPORT_ALL = f"""
import importlib, os, pkgutil, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # neither found nor imported
import lopt, lopt_kernels, bench
names = [module.name for package in (lopt, lopt_kernels, bench)
         for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_no_module_needs_what_only_posix_has() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 300
