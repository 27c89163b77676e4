"""Seeded damage: to bytes, to trees of JSON or TOML, to files with a right checksum, as accidents and strangers do."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from math import inf, nan
from random import Random
from typing import Any

from strangers import BLANK, CONTROLS, sign

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-45, 1e38, 1e39, 1e308),
    *(nan, inf, -inf, "", "a", "rule", "../../x", "a" * 5000, "\x00", *CONTROLS, "数", "\u0301", "%s{}$HOME"),
    *([], {}, [[]], [1, 2], {"a": 1}, {"": {}}, [None] * 300),
)


def damage_bytes(rng: Random, data: bytes) -> bytes:
    """Flipped bits, cut, doubled, moved or foreign bytes: one to four times."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64, 1000))
        part = data[at : at + length]
        data = rng.choice([
            data[:at] + bytes(x ^ (1 << rng.randrange(8)) for x in part) + data[at + length :],
            data[:at] + rng.randbytes(len(part)) + data[at + length :],
            data[:at],
            data[:at] + part + data[at:],
            data[:at] + data[at + length :],
            data[:at] + rng.choice((b"\x00", b"\xff", b"{", b'"', b"\xef\xbb\xbf", b"\n")) * length + data[at:],
        ])  # fmt: skip
    return data


def list_places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in [(tree, key), *list_places(tree[key])]]


def damage_tree(rng: Random, tree: Any) -> Any:
    """A copy in which values are nasty, swapped, missing, nested, renamed or of another size: one to three times."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list_places(tree)
        if not places:
            return rng.choice(NASTY)
        (container, key), (other, other_key) = rng.choice(places), rng.choice(places)
        value = container[key]
        how = rng.randrange(8)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice([x for x in NASTY if isinstance(x, str)])] = container.pop(key)
        elif how == 2:
            container[key] = copy.deepcopy(other[other_key])
        elif how == 3:
            container[key] = rng.choice(([value], {"x": value}, str(value)))
        elif how == 4 and type(value) in (int, float):
            container[key] = rng.choice((value + 1, -value, value * 1000, value / 3))
        elif how == 5:
            for _ in range(rng.choice((5, 60))):
                value = {"x": value} if rng.random() < 0.5 else [value]
            container[key] = value
        else:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    return tree


def damage_file(rng: Random, data: bytes) -> bytes:
    """A file of lopt with damage in its header or its numbers; in two of three its checksum is right again."""
    length = struct.unpack("<Q", data[:8])[0]
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    head = json.loads(header["__metadata__"]["lopt"]) | {"sha256": BLANK}
    how = rng.randrange(5)
    if how == 0:
        return damage_bytes(rng, data)
    if how == 1:
        numbers = damage_numbers(rng, numbers)
    elif how == 2:
        header = damage_tree(rng, header)
    else:
        head = damage_tree(rng, head)
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["lopt"] = json.dumps(head)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    changed = struct.pack("<Q", len(text)) + text + numbers
    return sign(changed) if rng.random() < 0.9 else changed


def damage_numbers(rng: Random, numbers: bytes) -> bytes:
    """Bits of one to four numbers, or a special one in its place."""
    for _ in range(rng.choice((1, 1, 4))):
        at = 4 * rng.randrange(max(1, len(numbers) // 4))
        special = struct.pack("<f", rng.choice((nan, inf, -inf, 1e30, -1e30, 1e-45, 3e38, 0.0, -1.0)))
        number = rng.choice((special, rng.randbytes(4)))
        numbers = numbers[:at] + number[: len(numbers) - at] + numbers[at + 4 :]
    return numbers


def write_toml(tree: dict[str, Any]) -> str:
    """TOML of tables of any depth; what it has no form for is written as text."""
    lines = []
    for key, value in tree.items():
        lines.append(f"{json.dumps(str(key))} = {_to_toml(value)}")
    return "\n".join(lines) + "\n"


def _to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_to_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_to_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else repr(value).replace("e", ".0e")
    return json.dumps(str(value)) if value is None else json.dumps(value)


Check = Callable[[Random], bool]
"""Makes one input, and checks what becomes of it; returns whether it was accepted."""
