"""Sentences of a grammar of templates, drawn at random.

Source: the templates of hassil (github.com/OHF-Voice/hassil), version 3: `(a|b)` is one of two, `[a]` is a or nothing,
`(a;b)` both in any order, `<name>` a rule, `{name}` or `{name:slot}` an entry of a list.
Differs from the source: sentences are drawn, not recognised; templates know nothing of each other's context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

DEEPEST = 50
"""Rules within rules beyond which a grammar is taken to go round in circles."""

CLOSING = {"(": ")", "[": "]"}


class Part(NamedTuple):
    """A piece of a template.

    Attributes:
        kind: "text", "rule" or "list", whose `name` says which; "(" or "[" for a group, or "(;" where all of its
            `options` follow each other in any order.
        options: sequences of pieces.
    """

    kind: str
    name: str = ""
    options: tuple[tuple[Part, ...], ...] = ()


@cache
def parse_template(template: str) -> tuple[Part, ...]:
    """The pieces of a template.

    Raises:
        ValueError: a bracket is not closed.
    """
    options, end, _ = _parse(template, 0, "")
    if len(options) > 1 or end != len(template):
        raise ValueError(f"template {template!r} has a stray bracket or bar")
    return options[0]


def _parse(template: str, start: int, closing: str) -> tuple[tuple[tuple[Part, ...], ...], int, str]:
    """Sequences up to a closing bracket, where that ends, and what stands between them."""
    options: list[tuple[Part, ...]] = []
    parts: list[Part] = []
    between = "|"
    i = start
    while i < len(template):
        letter = template[i]
        i += 1
        if letter == closing:
            return (*options, tuple(parts)), i, between
        if letter in "|;" and closing:
            between = letter
            options.append(tuple(parts))
            parts = []
        elif letter in CLOSING:
            inner, i, joined = _parse(template, i, CLOSING[letter])
            parts.append(Part(letter + ";" * (joined == ";"), options=inner))
        elif letter in "<{":
            end = template.find(">" if letter == "<" else "}", i)
            if end < 0:
                raise ValueError(f"template {template!r} does not close {letter}")
            parts.append(Part("rule" if letter == "<" else "list", template[i:end].partition(":")[0]))
            i = end + 1
        else:
            if letter == "\\" and i < len(template):
                letter, i = template[i], i + 1
            parts.append(Part("text", letter))
    if closing:
        raise ValueError(f"template {template!r} lacks a {closing}")
    return (*options, tuple(parts)), i, between


class Grammar(NamedTuple):
    """A language's rules and lists.

    Attributes:
        rules: templates by name.
        lists: by name, such as `{"values": [{"in": template}, ...]}` or `{"range": {"from": 0, "to": 100}}`; any other
            is open.
        invent: what may stand where a list is open, such as the name of a room.
    """

    rules: Mapping[str, str]
    lists: Mapping[str, Mapping[str, Any]]
    invent: Callable[[random.Random], str]

    def draw(self, template: str, generator: random.Random) -> str:
        """A sentence of a template, in small letters, with single blanks.

        Raises:
            ValueError: a template is malformed, or names a rule that is missing or goes round in circles.
        """
        return " ".join(self._draw(parse_template(template), generator, 0).lower().split())

    def _draw(self, parts: Sequence[Part], generator: random.Random, depth: int) -> str:
        if depth > DEEPEST:
            raise ValueError(f"rules of the grammar are nested deeper than {DEEPEST}: one of them names itself")
        return "".join(self._draw_part(part, generator, depth) for part in parts)

    def _draw_part(self, part: Part, generator: random.Random, depth: int) -> str:
        if part.kind == "text":
            return part.name
        if part.kind == "rule":
            if part.name not in self.rules:
                raise ValueError(f"the grammar has no rule <{part.name}>")
            return self._draw(parse_template(self.rules[part.name]), generator, depth + 1)
        if part.kind == "list":
            return self._draw_entry(self.lists.get(part.name, {}), generator, depth)
        if part.kind == "(;":
            order = sorted(part.options, key=lambda _: generator.random())
            return " ".join(self._draw(option, generator, depth) for option in order)
        if part.kind == "[" and generator.random() < 0.5:
            return ""
        return self._draw(pick(part.options, generator), generator, depth)

    def _draw_entry(self, entries: Mapping[str, Any], generator: random.Random, depth: int) -> str:
        if "values" in entries:
            value = pick(entries["values"], generator)
            template = value["in"] if isinstance(value, Mapping) else value
            return self._draw(parse_template(str(template)), generator, depth + 1)
        if "range" in entries:
            numbers = entries["range"]
            return str(pick(range(numbers["from"], numbers["to"] + 1, numbers.get("step", 1)), generator))
        return self.invent(generator)


def pick(things: Sequence[Any], generator: random.Random) -> Any:
    """One of them; unlike `Random.choice` the same in every version of Python."""
    return things[int(generator.random() * len(things))]
