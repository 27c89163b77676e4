"""What the pages say is true: their Python runs, links lead somewhere, and files, names and commands exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
from lopt_kernels import DIFFERENTIABLE_OPS, GROUP_OPS, OPS
from pages import PAGES, ROOT, find_anchors, find_code, find_links, find_spans

import lopt
from bench.program import cli as bench_cli
from lopt.cli.program import cli as lopt_cli
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.horizons import HORIZONS
from lopt.rules import RULES
from lopt.tasks import TASKS, TRANSFORMS

DOCS = [page for page in PAGES if page.parent != ROOT]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
COMMANDS = {"lopt": set(lopt_cli.commands), "python -m bench": set(bench_cli.commands), "make": TARGETS}
COMMAND = re.compile(r"(?:^|-m )(lopt|python -m bench|make) ([a-z][\w-]*)")
FOLDERS = ("lopt/", "kernels/", "bench/", "tests/", "docs/", "examples/")


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_page)
each_present_page = pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_page)
"""All but the changelog, which may name what is gone."""


@pytest.mark.parametrize("page", [p for p in DOCS if find_code(p, "python")], ids=name_page)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = [re.sub("^from __future__.*$", "", block, flags=re.MULTILINE) for block in find_code(page, "python")]
    # A file, as Triton reads the source of kernels there.
    Path("page.py").write_text("\n".join(["from __future__ import annotations", *code]))
    runpy.run_path("page.py")


@each_page
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in find_links(page):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{name_page(page)} links to {link}"
            assert not anchor or anchor in find_anchors(target), f"{name_page(page)} links to {link}"


@each_present_page
def test_files_named_in_a_page_exist(page: Path) -> None:
    for span in find_spans(page):
        if span.startswith(FOLDERS) and " " not in span:
            assert list(ROOT.glob(span.rstrip("/"))), f"{name_page(page)} names {span}"


def test_files_in_the_drawing_of_the_map_exist() -> None:
    (drawing,) = find_code(ROOT / "docs" / "map.md", "")
    names = re.findall(r"\w+(?:/\w+)*/(?:\w+\.py)?|\w+(?:/\w+)+(?:\.py)?", drawing)
    assert len(names) > 5
    folders = (ROOT, ROOT / "lopt", ROOT / "lopt" / "optim")
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []


@each_present_page
def test_python_names_in_a_page_exist(page: Path) -> None:
    for span in find_spans(page):
        if re.fullmatch(r"(lopt|lopt_kernels|bench)(\.\w+)+", span):
            assert resolve(span), f"{name_page(page)} names {span}"


@each_present_page
def test_commands_in_a_page_exist(page: Path) -> None:
    lines = [line for code in find_code(page, "") + find_code(page, "bash") for line in code.splitlines()]
    for text in [*lines, *find_spans(page)]:
        for program, command in COMMAND.findall(text):
            assert command in COMMANDS[program], f"{name_page(page)} names `{program} {command}`"


@pytest.mark.parametrize("folder", ["lopt", "kernels", "bench"])
def test_python_names_in_docstrings_and_comments_exist(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in re.findall(r"`((?:lopt|lopt_kernels|bench)(?:\.\w+)+)[`(]", path.read_text()):
            assert resolve(name), f"{path.relative_to(ROOT)} names {name}"


def test_the_reference_has_all_public_names_and_all_that_is_registered() -> None:
    documented = list_reference()
    registries = [RULES, TASKS, TRANSFORMS, ESTIMATORS, HORIZONS]
    names = [f"{thing.__module__}.{thing.__qualname__}" for registry in registries for thing in registry.values()]
    names += [f"lopt.{name}" for name in lopt.__all__ if name != "__version__"]
    references = [op.reference for ops in (OPS, GROUP_OPS, DIFFERENTIABLE_OPS) for op in ops.values()]
    # Elementwise ops share one reference, which is given their formula.
    names += [(f.args[0].reference if isinstance(f, partial) else f).__module__ for f in references]
    assert [name for name in names if not documented & {name, name.rpartition(".")[0]}] == []


def list_reference() -> set[str]:
    """What the directives of docs/reference ask for, `package.*` written out as docs/hooks.py does it."""
    names = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            package = name.removesuffix(".*")
            assert resolve(package), f"{name_page(page)} asks for {name}"
            folder = ROOT / ("kernels" if name.startswith("lopt_kernels") else "") / package.replace(".", "/")
            names |= {f"{package}.{path.stem}" for path in folder.glob("*.py")} if name != package else {name}
    return names


def resolve(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    module, _, rest = name.partition(".")
    thing = importlib.import_module(module)
    for part in rest.split("."):
        if not hasattr(thing, part):
            module = f"{thing.__name__}.{part}" if hasattr(thing, "__path__") else ""
            if not module or importlib.util.find_spec(module) is None:
                return False
            importlib.import_module(module)
        thing = getattr(thing, part)
    return True
