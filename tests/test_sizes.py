"""The house stays one that can be taken in: what lies in its hall, how long things are, and what a docstring is not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALL = {"__init__.py", "__main__.py", "py.typed", "core", "rules", "tasks", "optim", "meta", "evaluation", "cli"}
MAX_FILE, MAX_CLASS, MAX_FUNCTION = 400, 300, 60  # lines
SOURCES = sorted(path for folder in ("lopt", "kernels", "bench") for path in (ROOT / folder).rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def find_long(source: str) -> list[str]:
    """Definitions of more lines than they may have; decorators, which declare a command's options, do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > (MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION):
                found.append(f"{node.name}: {lines} lines")
    return found


def test_the_package_has_seven_folders_and_nothing_else_in_its_root() -> None:
    assert {path.name for path in (ROOT / "lopt").iterdir() if path.name != "__pycache__"} == HALL


@each_source
def test_files_classes_and_functions_are_of_a_size_to_read(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE
    assert find_long(source) == []


@each_source
def test_no_docstring_sends_its_reader_to_another_one(path: Path) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [
        ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)
    ]
    assert [text for text in texts if text.startswith("See ")] == []


def test_long_definitions_are_found() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(MAX_FUNCTION))
    assert find_long(f"def f():\n{body}") == [f"f: {MAX_FUNCTION + 1} lines"]
    assert find_long(f"class C:\n{body}") == []
