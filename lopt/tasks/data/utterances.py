"""What people say when they want something of a machine, by language and intent, for few-shot classification of texts.

Which ones is said by a string: "home-assistant", drawn from the templates of the package home-assistant-intents
(Apache-2.0), which are read where it is installed; or "texts:FOLDER".
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.tasks.base import POOLS
from lopt.tasks.data.templates import Grammar, pick
from lopt.tasks.data.wheels import find_folder, read_lines

TEXTS = 40
"""Different texts of an intent in a language, at most."""

FEWEST = 20
"""Texts below which a language is said not to have an intent."""

TRIES = 10

OR_LESS = ", or the data alone, pip install home-assistant-intents"

Texts = dict[str, list[str]]
"""By intent."""


class Utterances(NamedTuple):
    """Texts of intents that all languages have.

    Attributes:
        languages: names.
        intents: names, in the order of the pools.
        texts: for each language and intent, `FEWEST` to `TEXTS` different ones in small letters.
        pools: numbers of a pool's intents, as a range.
    """

    languages: tuple[str, ...]
    intents: tuple[str, ...]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    pools: dict[str, range]


@cache
def load_utterances(data: str, languages: str) -> Utterances:
    """Texts with intents in pools: three tenths of the intents are for tests, a fifth for validation.

    Args:
        data: "home-assistant", or "texts:FOLDER" with files `LANGUAGE/INTENT.txt` of a text in each line.
        languages: separated by commas. Intents that one of them lacks are left out.
    Raises:
        ValueError: `data` is none of these, a file is not what it should be, or fewer than 10 intents are left.
        FileNotFoundError: a file is missing.
        ImportError: home-assistant-intents is missing.
    """
    names = tuple(name.strip() for name in languages.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"languages must be different names with commas between, such as 'en,de', got {languages!r}")
    read = _find_reader(data)
    found = [read(name) for name in names]
    common = sorted(set.intersection(*(set(texts) for texts in found)))
    if len(common) < 10:
        raise ValueError(f"{data} has {len(common)} intents with {FEWEST} texts in each of {languages}, fewer than 10")
    order = torch.randperm(len(common), generator=make_generator(derive_seeds(0, "intents"))).tolist()
    intents = tuple(common[i] for i in order)
    sizes = {"outer_valid": len(intents) // 5, "test": 3 * len(intents) // 10}
    sizes["train"] = len(intents) - sum(sizes.values())
    pools, first = {}, 0
    for pool in POOLS:
        pools[pool] = range(first, first + sizes[pool])
        first += sizes[pool]
    return Utterances(names, intents, tuple(tuple(tuple(texts[i]) for i in intents) for texts in found), pools)


def _find_reader(data: str) -> Callable[[str], Texts]:
    kind, _, path = data.partition(":")
    if data == "home-assistant":
        return partial(_draw_texts, find_folder("home_assistant_intents", "language", OR_LESS) / "data")
    if kind != "texts" or not path:
        choose("data", data, ["home-assistant", "texts:FOLDER"])
    return partial(_read_texts, Path(path).expanduser())


def _read_texts(folder: Path, language: str) -> Texts:
    files = sorted((folder / language).glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{folder / language} has no files INTENT.txt with a text in each line")
    texts = {file.stem: list(dict.fromkeys(line.lower().strip() for line in read_lines(file))) for file in files}
    return {intent: found[:TEXTS] for intent, found in texts.items() if len(found) >= FEWEST}


def _draw_texts(folder: Path, language: str) -> Texts:
    """Texts of the templates of a language; each block of templates is as frequent as any other of its intent."""
    path = folder / f"{language}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise ValueError(f"home-assistant-intents has no language {language!r}; it has {known}")
    content = json.loads(path.read_text("utf-8"))
    grammar = Grammar(content["expansion_rules"], content["lists"], partial(_invent, _find_words(content["responses"])))
    texts = {}
    for intent, blocks in content["intents"].items():
        generator = random.Random(int(derive_seeds(0, f"texts of {intent} in {language}")))
        found: dict[str, None] = {}
        for _ in range(TRIES * TEXTS):
            block = pick(blocks["data"], generator)
            found[grammar.draw(pick(block["sentences"], generator), generator)] = None
            if len(found) == TEXTS:
                break
        if len(found) >= FEWEST:
            texts[intent] = list(found)
    return texts


def _find_words(responses: Mapping[str, Any]) -> tuple[str, ...]:
    """Words of a language: those of the machine's answers."""
    answers = " ".join(text for answer in responses["intents"].values() for text in answer.values())
    plain = re.sub(r"\{[{%].*?[%}]\}", " ", answers, flags=re.DOTALL)
    return tuple(sorted({word.lower() for word in re.findall(r"[^\W\d_]{2,}", plain)}))


def _invent(words: tuple[str, ...], generator: random.Random) -> str:
    """A name of one or two words that mean nothing: each is the beginning of one word and the end of another."""
    halves = [(pick(words, generator), pick(words, generator)) for _ in range(pick((1, 1, 2), generator))]
    return " ".join(first[: (len(first) + 1) // 2] + last[len(last) // 2 :] for first, last in halves)
