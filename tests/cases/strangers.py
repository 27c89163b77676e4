"""What a stranger may put into a file: any content under a right checksum, and text that steers terminals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as encode_tensors
from torch import Tensor

BLANK = "0" * 64
CONTROLS = (
    "\x1b[2J\x1b]0;title\x07",  # clears the screen, renames the window
    "\x1b]52;c;cHduZWQ=\x07",  # fills the clipboard
    "\x1b]8;;file:///etc/passwd\x1b\\x\x1b]8;;\x1b\\",  # a link
    "\x9b31m\x85\x7f\x00\b\r",  # C1, delete, NUL, over the line before
    "abc\u202edcba\u2066x\u200b\u2028",  # writing direction, nothing to see, a line of its own
)


def write_rule_file(path: Path, weights: Mapping[str, Tensor], **head: Any) -> Path:
    """A rule file whose checksum is right, whatever is in it.

    Args:
        weights: without their prefix.
        head: entries of lopt's object; by default a rule `linear` with an empty card.
    """
    about = {"sha256": BLANK, "format": 1, "version": "0", "kind": "rule", "rule": "linear", "config": {}, "card": {}}
    tensors = {f"rule.{name}": value.detach().clone().contiguous() for name, value in weights.items()}
    data = encode_tensors(tensors, {"lopt": dump(about | head)})
    path.write_bytes(sign(data))
    return path


def dump(content: Any) -> str:
    """JSON, of deeper nesting than `json` can write."""
    try:
        return json.dumps(content)
    except RecursionError:
        depth, inner = 0, content["card"]
        while isinstance(inner, dict) and inner:
            depth, inner = depth + 1, next(iter(inner.values()))
        return json.dumps(content | {"card": "@"}).replace('"@"', '{"x":' * depth + "{}" + "}" * depth)


def sign(data: bytes) -> bytes:
    """The same file with its checksum in place of zeros."""
    return data.replace(BLANK.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
