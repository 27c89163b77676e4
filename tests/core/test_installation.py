"""Advice to install an extra works from a checkout, a wheel, an address, an index, and where nothing is installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lopt.core import installation
from lopt.core.installation import advise
from lopt.core.version import VERSION

ROOT = Path(__file__).parents[2]
REQUIRES = """
Requires-Dist: torch>=2.10
Provides-Extra: train
Requires-Dist: click>=8.1; extra == 'train'
Requires-Dist: tomli>=2.0; (python_version < '3.11') and extra == 'train'
Provides-Extra: suites
Requires-Dist: lopt[train]; extra == 'suites'
Requires-Dist: networkx>=3.0; extra == 'suites'
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that lopt was installed from somewhere: what pip leaves behind."""

    def write(record: object) -> None:
        folder = tmp_path / "lopt-9.9.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lopt\nVersion: 9.9{REQUIRES}")
        if record is not None:
            (folder / "direct_url.json").write_text(record if isinstance(record, str) else json.dumps(record))
        found = importlib.metadata.PathDistribution(folder)
        monkeypatch.setattr(installation, "distribution", lambda name: found)

    return write


def test_from_an_index_the_name_is_enough(install: Any) -> None:
    install(None)
    assert advise("train") == 'pip install "lopt[train]"'


@pytest.mark.parametrize(("editable", "flag"), [(True, "-e "), (False, "")])
def test_from_a_checkout_its_path_is_given(install: Any, tmp_path: Path, editable: bool, flag: str) -> None:
    (folder := tmp_path / "my code" / "lopt").mkdir(parents=True)
    install({"url": folder.as_uri(), "dir_info": {"editable": editable}})
    assert "%20" in folder.as_uri()
    assert advise("train") == f'pip install {flag}"{folder}[train]"'


def test_from_a_wheel_the_file_is_given(install: Any, tmp_path: Path) -> None:
    (wheel := tmp_path / "lopt-9.9-py3-none-any.whl").touch()
    install({"url": wheel.as_uri(), "archive_info": {"hash": "sha256=00"}})
    assert advise("suites") == f'pip install "{wheel}[suites]"'


def test_where_the_wheel_is_gone_the_requirements_are_named(install: Any, tmp_path: Path) -> None:
    install({"url": (tmp_path / "gone.whl").as_uri(), "archive_info": {}})
    assert advise("train") == 'pip install "click>=8.1" "tomli>=2.0"'
    assert advise("suites") == 'pip install "click>=8.1" "tomli>=2.0" "networkx>=3.0"'


def test_from_an_address_it_is_given(install: Any) -> None:
    install({"url": "https://example.org/lopt-9.9.tar.gz", "archive_info": {}})
    assert advise("train") == 'pip install "lopt[train] @ https://example.org/lopt-9.9.tar.gz"'
    install({"url": "https://example.org/lopt", "vcs_info": {"vcs": "git", "commit_id": "12ab"}})
    assert advise("train") == 'pip install "lopt[train] @ git+https://example.org/lopt@12ab"'


@pytest.mark.parametrize("record", ["{", "[1]", '{"url": 3, "vcs_info": {}}'])
def test_a_record_that_is_not_understood_counts_as_none(install: Any, record: str) -> None:
    install(record)
    assert advise("train") == 'pip install "lopt[train]"'


def test_sources_that_are_only_on_the_path_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", refuse)
    assert advise("train") == f'pip install "{ROOT}[train]"'
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    assert advise("train") == 'pip install "lopt[train]"'


def test_no_message_names_the_package_by_hand() -> None:
    files = [*(ROOT / "lopt").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    written = [path.name for path in files if re.search(r"pip install ['\"]?lopt", path.read_text())]
    assert written == ["installation.py"]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [page.name for page in pages if re.search(r"pip install ['\"]?lopt", page.read_text())] == []


@pytest.mark.parametrize(("name", "module"), [("train", "filelock"), ("evaluate", "scipy.stats")])
def test_doors_name_the_extra_that_they_need(name: str, module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import lopt; lopt.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    told = done.stderr.splitlines()[-1]
    assert re.match(rf"ImportError: lopt\.{name} needs the extra 'train' \(.*{module}.*\): pip .*\[train\]", told)


def test_the_version_is_written_once() -> None:
    files = [path for path in ROOT.glob("*") if path.suffix in (".toml", ".cff", ".py")]
    assert [path.name for path in files if f'"{VERSION}"' in path.read_text()] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
