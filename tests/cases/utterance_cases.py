"""A small folder of texts: languages with words of their own, whose intents are named by one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt.tasks.data.wheels import find_folder

LANGUAGES = ("one", "two", "three")
INTENTS = 20


def has_home_assistant() -> bool:
    try:
        find_folder("home_assistant_intents", "language")
    except ImportError:
        return False
    return True


needs_home_assistant = pytest.mark.skipif(
    not has_home_assistant(), reason="texts of intents: pip install 'lopt[language]'"
)


def write_texts(folder: Path, *, texts: int = 24) -> str:
    """What the option `data` is to be for it: an intent is a verb and a noun, of which five intents have the same.

    A word is a letter between two of its language's, so that no n-gram is in two languages.
    """
    for language in LANGUAGES:
        place = folder / language
        place.mkdir(parents=True, exist_ok=True)
        words = [language[:2] + letter + language[:2] for letter in "bcdfghjkl"]
        for intent in range(INTENTS):
            verb, noun = words[intent % 5], words[5 + intent // 5]
            lines = [f"{verb} {language}{i} {noun}" for i in range(texts)]
            (place / f"intent{intent:02}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return f"texts:{folder}"
