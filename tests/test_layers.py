"""The architecture, kept by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lopt

ROOT = Path(__file__).parent.parent
# Imports go only downward; the folders of one line do not know each other. A new file needs no edit here.
LAYERS = [
    {"lopt_kernels"},
    {"lopt.core"},
    {"lopt.rules", "lopt.tasks"},
    {"lopt.optim", "lopt.meta"},
    {"lopt.evaluation"},
    {"lopt.cli"},
    {"lopt.__main__"},
]
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
OPTIMIZER_MUST_NOT_IMPORT = [
    *("lopt.meta", "lopt.tasks", "lopt.evaluation", "lopt.cli"),
    *("sklearn", "matplotlib", "tensorboard", "click", "rich"),
]


def find_modules() -> list[Path]:
    return sorted([*(ROOT / "lopt").rglob("*.py"), *(ROOT / "kernels" / "lopt_kernels").rglob("*.py")])


def name_module(path: Path) -> str:
    """The noun that a file belongs to: `lopt.rules` for lopt/rules/adam.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "lopt_kernels"
    return ".".join(parts[:2]) if parts[1] != "__init__" else "lopt"


def find_imports(path: Path) -> set[str]:
    """Nouns that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "lopt":
                names = [f"lopt.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lopt_kernels":
                found.add("lopt_kernels")
            elif parts[0] == "lopt" and len(parts) > 1:
                found.add(".".join(parts[:2]))
    return found


@pytest.mark.parametrize("path", find_modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_only_downward(path: Path) -> None:
    module = name_module(path)
    if module == "lopt":  # the package itself re-exports
        return
    assert module in LEVEL, f"{module} has no layer: add it to LAYERS"
    upward = {m for m in find_imports(path) - {module} if LEVEL.get(m, -1) >= LEVEL[module]}
    assert not upward, f"{path} (layer {LEVEL[module]}) imports {upward}"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


HEAVY = ["torch", "lopt.meta", "lopt.evaluation", "lopt.optim", "matplotlib", "sklearn", "numpy"]


@pytest.mark.parametrize("code", ["import lopt", "from lopt.cli.program import cli"])
def test_importing_lopt_or_its_command_line_loads_nothing_heavy(code: str) -> None:
    code = f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_listed_and_found() -> None:
    assert set(lopt.__all__) <= set(dir(lopt))
    assert all(getattr(lopt, name) is not None for name in lopt.__all__)
    with pytest.raises(AttributeError, match=r"'lopt' has no attribute 'nothing'"):
        lopt.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_using_an_optimizer_imports_no_training_code() -> None:
    code = (
        "import sys, torch, lopt; from lopt.rules import RULES;"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3);"
        "lopt.LearnedOptimizer([p], rule=RULES['lstm']()).step();"
        f"print([m for m in {OPTIMIZER_MUST_NOT_IMPORT} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "dill", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "eval", "exec", "builtins.eval", "builtins.exec"}
SAFE_VALUES = {"allow_pickle": False, "weights_only": True}


def find_unsafe(source: str) -> list[str]:
    """What in a module can run code that comes from data."""
    tree, found, names = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = [(alias.name, alias.name, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [(node.module, f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        found += [module for module, _, _ in whole if module.split(".")[0] in UNSAFE_MODULES]
        names |= {local: name for _, name, local in whole if local}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            call = ".".join([names.get(first, first), *rest])
            restricted = call == "torch.load" and any(keyword.arg == "weights_only" for keyword in node.keywords)
            found += [call] * (call in UNSAFE_CALLS and not restricted)
            for keyword in node.keywords:
                safe = SAFE_VALUES.get(keyword.arg or "")
                if safe is not None and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is safe):
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("path", find_modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert find_unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("import os, pickle as p", "pickle"),
        ("from pickle import loads as f", "pickle"),
        ("def f():\n    import marshal", "marshal"),
        ("from dill import load", "dill"),
        ("import shelve as s", "shelve"),
        ("torch.load(path)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("read(path, weights_only=flag)", "weights_only=flag"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("yaml.load(text)", "yaml.load"),
        ("eval(text)", "eval"),
        ("from builtins import exec as run\nrun(text)", "builtins.exec"),
    ],
)
def test_unpickling_and_evaluating_are_found_in_any_spelling(source: str, found: str) -> None:
    assert found in find_unsafe(source)


def test_harmless_code_is_not_taken_for_unpickling() -> None:
    source = "import torch, numpy as np\ntorch.load(path, weights_only=True)\n"
    source += "model.eval()\nnp.load(path, allow_pickle=False)\nself.load(path)"
    assert find_unsafe(source) == []
