"""Names: the known ones that an unknown one may have meant, and names fit for a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from hashlib import sha256

MAX_BYTES = 200


def suggest(name: object, known: Iterable[str]) -> str:
    """What to say of an unknown name: "Did you mean adam? Known: adam, lstm, sgd"."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=3)
    question = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{question}Known: {', '.join(names) or 'none'}"


def slugify(label: str) -> str:
    """A label as the name of one folder: letters, digits, dots, dashes; never empty, hidden, a path or too long."""
    slug = re.sub(r"[^\w.]+", "-", label).strip(".-") or "unnamed"
    data = slug.encode()
    if len(data) <= MAX_BYTES:
        return slug
    return f"{data[:MAX_BYTES].decode(errors='ignore')}-{sha256(data).hexdigest()[:8]}"
