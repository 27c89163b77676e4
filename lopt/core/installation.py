"""How this lopt was installed, so that messages say what works here: `pip install lopt[train]` from an index alone.

Source: PEP 610, "direct_url.json": a checkout, a wheel or an address that pip was given is recorded; an index is not.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

CHECKOUT = Path(__file__).parents[2]


def advise(extra: str) -> str:
    """The command that installs what an extra needs beside this lopt, however it came here.

    Args:
        extra: a name of `[project.optional-dependencies]`.
    Returns:
        Such as `pip install -e "/home/me/lopt[train]"` for a checkout, `pip install "/tmp/lopt-1.whl[train]"` for a
        wheel, `pip install "lopt[train]"` for an index; where a checkout or wheel is gone, the requirements by name.
    """
    try:
        found = distribution("lopt")
    except PackageNotFoundError:  # the sources are on the path, but not installed
        is_checkout = (CHECKOUT / "pyproject.toml").is_file()
        return f'pip install "{CHECKOUT if is_checkout else "lopt"}[{extra}]"'
    given = _read_source(found)
    if given is None:
        return f'pip install "lopt[{extra}]"'
    source, flag = given
    if not source:
        return " ".join(["pip install", *(f'"{name}"' for name in list_requirements(found, extra))])
    if "://" in source:
        return f'pip install "lopt[{extra}] @ {source}"'
    return f'pip install {flag}"{source}[{extra}]"'


def list_requirements(found: Distribution, extra: str) -> list[str]:
    """What an extra asks for, with the extras of lopt that it names written out; markers of platforms are left out.

    Args:
        found: of lopt.
    """
    own = re.compile(rf"""\bextra\s*==\s*['"]{re.escape(extra)}['"]""")
    names: list[str] = []
    for line in found.requires or []:
        requirement, _, marker = line.partition(";")
        if own.search(marker):
            inner = re.fullmatch(r"lopt\[([\w-]+)\]", requirement.strip())
            names += list_requirements(found, inner[1]) if inner else [requirement.strip()]
    return list(dict.fromkeys(names))


def _read_source(found: Distribution) -> tuple[str, str] | None:
    """What pip was given and the flag for it: a path, an address, or "" for a path that is gone; None for an index."""
    text = found.read_text("direct_url.json")
    try:
        record = json.loads(text or "null")
        if not record:
            return None
        address = str(record["url"])
        if "vcs_info" in record:
            kind = record["vcs_info"]
            return f"{kind['vcs']}+{address}@{kind['commit_id']}", ""
        if urlsplit(address).scheme != "file":
            return address, ""
        path = Path(url2pathname(unquote(urlsplit(address).path)))
        return str(path) if path.exists() else "", "-e " if record.get("dir_info", {}).get("editable") else ""
    except (ValueError, KeyError, TypeError):  # written by another installer
        return None
