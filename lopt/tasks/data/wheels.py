"""Data that other packages bring along: their files are read where they are installed, and never copied."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lopt.core.installation import advise


def find_folder(package: str, extra: str, or_less: str = "") -> Path:
    """Where a package's files are, without importing it.

    Args:
        package: of the top level.
        extra: of lopt, with which it is installed.
        or_less: the end of the advice: how it alone is installed.
    Raises:
        ImportError: it is not installed; the message says how it is.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package}, which brings the data, is not installed: {advise(extra)}{or_less}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text that are not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in this encoding.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in {encoding} ({error}); get it anew") from error
    return [line for line in text.splitlines() if line]
