"""Characters of the DejaVu fonts, which come with matplotlib: real glyphs in a dozen faces, without a download."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lopt.core.installation import advise

FACES = [f"DejaVu{f}{s}" for f in ("Sans", "Serif", "SansMono") for s in ("", "-Bold", "-Oblique", "-BoldOblique")]
SLANTED = {"DejaVuSerif-Oblique": "DejaVuSerif-Italic", "DejaVuSerif-BoldOblique": "DejaVuSerif-BoldItalic"}

LETTERS = ("Lu", "Ll", "Lt", "Lo")
"""Unicode's categories of letters that stand by themselves."""

FEWEST = 4
"""Faces that a character must be in: most scripts are in those of one family."""

EM = 12 / 14
"""Size of the font in sides of the image: nearly all letters fit; larger ones are drawn smaller."""


def draw_scripts(scripts: Sequence[str], side: int) -> list[list[np.ndarray]]:
    """The letters of some scripts in all faces that have them.

    Args:
        scripts: how Unicode's names of their characters begin, such as "GREEK".
        side: of the images, which have the ink in the middle; letters keep their sizes relative to each other.
    Returns:
        For each letter, by its code, one image `[side, side]` uint8 per face (at least `FEWEST`), bright on dark.
    Raises:
        ImportError: matplotlib is missing.
    """
    faces = _open_faces()
    drawn = []
    for character in _list_letters(scripts):
        owners = [font for font, codes in faces if character in codes]
        if len(owners) >= FEWEST:
            drawn.append([_draw(font, chr(character), side) for font in owners])
    return drawn


@cache
def _open_faces() -> list[tuple[Any, frozenset[int]]]:
    """The faces, and the codes of their characters."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError(f"the glyphs come with matplotlib: {advise('train')}") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [FT2Font(str(folder / f"{SLANTED.get(face, face)}.ttf")) for face in FACES]
    return [(font, frozenset(font.get_charmap())) for font in fonts]


def _list_letters(scripts: Sequence[str]) -> Iterator[int]:
    for code in sorted(frozenset().union(*(codes for _, codes in _open_faces()))):
        name = unicodedata.name(chr(code), "")
        if unicodedata.category(chr(code)) in LETTERS and any(name.startswith(f"{script} ") for script in scripts):
            yield code


def _draw(font: Any, character: str, side: int) -> np.ndarray:
    size = EM * side
    ink = _find_ink(font, character, size)
    if max(ink.shape) > side:
        ink = _find_ink(font, character, size * (side - 0.5) / max(ink.shape))[:side, :side]
    image = np.zeros((side, side), np.uint8)
    top, left = ((side - length) // 2 for length in ink.shape)
    image[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return image


def _find_ink(font: Any, character: str, size: float) -> np.ndarray:
    """The character in grey at `size` pixels to the em, cut to what is not 0."""
    font.set_size(size, 72)
    font.set_text(character, 0.0, flags=_find_flags())
    font.draw_glyphs_to_bitmap(antialiased=True)
    image = np.asarray(font.get_image())
    rows, columns = (image.any(axis).nonzero()[0] for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else image[:0, :0]


@cache
def _find_flags() -> Any:
    """Without hints, which would move lines to whole pixels and depend on the version of FreeType."""
    ft2font: Any = import_module("matplotlib.ft2font")
    return ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else ft2font.LOAD_NO_HINTING
