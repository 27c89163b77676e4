"""The architecture, kept by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"lopt_kernels"},
    {"lopt.tensors"},
    {"lopt.rules", "lopt.tasks"},
    {"lopt.unroll", "lopt.horizons", "lopt.checkpoint"},
    {"lopt.estimators", "lopt.optim", "lopt.log"},
    {"lopt.config", "lopt.evaluate"},
    {"lopt.trainer", "lopt.plots"},
    {"lopt.runs", "lopt.report", "lopt.progress", "lopt.judge", "lopt.inspection", "lopt.dropin"},
    {"lopt.__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
OPTIMIZER_MUST_NOT_IMPORT = [
    *("lopt.estimators", "lopt.tasks", "lopt.trainer", "lopt.evaluate", "lopt.config"),
    *("sklearn", "matplotlib", "tensorboard", "click", "rich", "dacite"),
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


def test_using_an_optimizer_imports_no_training_code() -> None:
    code = (
        "import sys, torch, lopt; from lopt.rules import RULES;"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3);"
        "lopt.LearnedOptimizer([p], rule=RULES['lstm']()).step();"
        f"print([m for m in {OPTIMIZER_MUST_NOT_IMPORT} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


def test_nothing_is_unpickled_or_evaluated() -> None:
    banned = ("pickle.load", "torch.load", "allow_pickle=True", "yaml.load", "eval(", "exec(")
    for path in find_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func) + "("
                assert not any(call == b or call.rstrip("(").endswith(b) for b in banned), f"{path}: {call}"
