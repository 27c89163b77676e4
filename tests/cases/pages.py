"""What the tests read in the Markdown of the repository: code, links, headings, and the names of files and things."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def find_code(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, `""` for those that name none."""
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def find_links(page: Path) -> list[str]:
    """Targets of links and pictures, code taken out."""
    return LINK.findall(SPAN.sub("", FENCE.sub("", page.read_text())))


def find_anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may say behind `#`: small letters, blanks as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def find_spans(page: Path) -> list[str]:
    """What stands between single backticks outside of fenced code."""
    return SPAN.findall(FENCE.sub("", page.read_text()))
