"""What is checked on other Pythons and other releases of torch: `nox`, or one session, such as `nox -s "tests-3.12"`.

A session whose Python or torch cannot be had is skipped with the reason; with CI set in the environment it fails.
`nox -s tests -- tests` runs the whole suite in place of what a platform could break.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = {
    "oldest": ("torch==2.10.*", "numpy<2.4"),  # in later ones the interpreter of its triton, 3.6, fails
    "newest": ("torch>=2.10",),
}
PORTABLE = (
    *("tests/test_platforms.py", "tests/test_layers.py", "tests/test_examples_in_docstrings.py", "tests/core"),
    *("tests/rules/test_rules.py", "tests/rules/test_rule_files.py", "tests/rules/test_golden.py"),
    *("tests/optim/test_contract_step.py", "tests/optim/test_contract_state.py", "tests/optim/test_contract_torch.py"),
    *("tests/optim/test_traced.py", "tests/meta/test_estimators.py", "tests/meta/test_config.py"),
)
"""Of what depends on the release of Python or torch: the contract of torch.optim, tracing, functional calls, files."""
USE = (
    "import torch, lopt; model = torch.nn.Linear(3, 1); optimizer = lopt.LearnedOptimizer(model.parameters());"
    "model(torch.ones(2, 3)).sum().backward(); optimizer.step(); print(lopt.__version__, optimizer.report())"
)

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "package", "tests"]


@nox.session(python=PYTHONS)
@nox.parametrize("torch", list(TORCHES))
def tests(session: nox.Session, torch: str) -> None:
    """The portable tests with one Python and one torch."""
    install(session, *TORCHES[torch], "--editable", ".[dev]")
    session.run("python", "-c", USE)
    session.run("pytest", "-p", "no:cacheprovider", *(session.posargs or PORTABLE), env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types, with the versions that `make` installs."""
    install(session, "--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def package(session: nox.Session) -> None:
    """Build both archives, check what an index would show, install the wheel, and use it outside of the checkout."""
    install(session, "build", "twine")
    folder = Path(session.create_tmp()).absolute()
    session.run("python", "-m", "build", "--outdir", str(folder))
    archives = sorted(map(str, folder.glob("lopt-*")))
    session.run("twine", "check", "--strict", *archives)
    (wheel,) = folder.glob("*.whl")
    install(session, str(wheel))
    session.chdir(folder)
    session.run("python", "-c", USE)
    session.run("lopt", "--version", success_codes=[1])  # the extra `train` is missing: it says how to get it
    install(session, f"{wheel}[train]")
    session.run("lopt", "--version")
    session.run("lopt", "list", "shipped")


def install(session: nox.Session, *arguments: str) -> None:
    """`pip install`; where that fails the session is skipped with pip's reason, or in CI fails."""
    python = Path(session.virtualenv.bin) / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    session.log(" ".join(command[1:]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines()]
        reasons = [line for line in lines if line.startswith("ERROR: ")] or lines
        reason = f"cannot be installed here: {(reasons or ['pip says nothing'])[-1]}"
        (session.error if os.environ.get("CI") else session.skip)(reason)
