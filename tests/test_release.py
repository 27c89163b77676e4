"""The archive that would be uploaded: what is in it, what an index shows of it, and what is written once."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from lopt.core.version import VERSION

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built by hatchling, as pip does it."""
    pytest.importorskip("hatchling", reason="building the package: extra `dev`")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(folder)!r}))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"lopt-{VERSION}.dist-info/METADATA"))


def test_wheel_has_the_packages_their_data_and_types_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"lopt", "lopt_kernels", f"lopt-{VERSION}.dist-info"}
    for part in ("lopt/py.typed", "lopt_kernels/py.typed", "lopt/rules/pretrained/lopt-base.safetensors"):
        assert part in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "lopt").rglob("*.*") if "__pycache__" not in path.parts}
    assert tracked <= set(names)
    assert sum(entry.compress_size for entry in wheel.infolist()) < 3e6


def test_what_an_index_shows_is_whole(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("lopt", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    addresses = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    repository = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    assert set(addresses) == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(address.startswith(repository) for address in addresses.values())
    text = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    assert [link for link in links if not re.match(r"https?:|#", link)] == []
    assert f"![A learned rule against tuned baselines on digits]({repository}/raw/main/docs/digits.png)" in text
    assert f"[using a rule]({repository}/blob/main/docs/use.md)" in text


def test_readme_is_rendered_as_an_index_does_it(metadata: Message) -> None:
    markdown = pytest.importorskip("readme_renderer.markdown", reason="an index's page: extra `dev`")
    page = markdown.render(str(metadata.get_payload()))
    assert page is not None
    assert page.count("<table>") == len(re.findall(r"^\|(?:-+\|)+$", str(metadata.get_payload()), re.M)) > 0
    assert "<pre" in page
    assert page.count("<img ") == 1


def test_classifiers_are_known_and_say_what_is_tested(metadata: Message) -> None:
    known = pytest.importorskip("trove_classifiers", reason="comes with hatchling: extra `dev`").classifiers
    given = metadata.get_all("Classifier", [])
    assert set(given) <= known
    tested = re.search(r"PYTHONS = \((.*)\)", (ROOT / "noxfile.py").read_text())
    assert tested
    pythons = re.findall(r"[\d.]+", tested[1])
    assert [c.rpartition(" ")[2] for c in given if re.search(r":: 3\.\d+$", c)] == pythons
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', re.findall(r"python: \[.*\]", workflow)[0]) == pythons


def test_oldest_torch_is_the_one_that_sessions_install() -> None:
    (torch,) = (name for name in PROJECT["project"]["dependencies"] if name.startswith("torch"))
    oldest = torch.removeprefix("torch>=")
    text = (ROOT / "noxfile.py").read_text()
    assert f'"torch=={oldest}.*"' in text
    assert f'"torch>={oldest}"' in text


def test_where_the_project_lives_is_written_once() -> None:
    repository = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    listed = subprocess.run(["git", "grep", "-lF", repository], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode > 1:
        pytest.skip("no git repository")
    assert listed.stdout.split() == ["pyproject.toml"]


def test_citation_names_what_the_metadata_do_and_no_version() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with huggingface_hub: extra `dev`")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["project"]["license"]
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]
    assert "version" not in citation
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())


def test_sessions_that_the_workflow_names_are_there() -> None:
    pytest.importorskip("nox", reason="sessions on other Pythons: pip install nox")
    command = [sys.executable, "-m", "nox", "--list", "--noxfile", str(ROOT / "noxfile.py")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"NO_COLOR": "1"})
    sessions = set(re.findall(r"^\* (\S+)", listed.stdout, re.MULTILINE))
    named = [f"tests-{python}(torch='{torch}')" for python in ("3.10", "3.13") for torch in ("oldest", "newest")]
    assert {*named, "lint", "package"} <= sessions
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "nox -s \"tests-${{ matrix.python }}(torch='${{ matrix.torch }}')\"" in workflow
    assert "torch: [oldest, newest]" in workflow
