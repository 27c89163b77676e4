"""Characters that were drawn several times each, for few-shot classification: the pools have different scripts.

Which ones is said by a string: "dejavu", out of the fonts that come with matplotlib, or "omniglot:FOLDER".
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.core.installation import advise
from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.tasks.base import POOLS
from lopt.tasks.data.fonts import draw_scripts

PAPER = 128
"""Mean brightness above which a drawing is dark ink on white paper, and turned into its negative."""

SCRIPTS = {
    "train": ("LATIN", "GREEK", "CYRILLIC"),
    "outer_valid": ("ARABIC", "ARMENIAN", "HEBREW", "LAO"),
    "test": ("CANADIAN SYLLABICS", "GEORGIAN"),
}
"""Of DejaVu, as Unicode's names of characters begin."""

FOLDERS = {"train": "images_background", "test": "images_evaluation"}
"""Omniglot's own division of its alphabets."""

Script = list[list[np.ndarray]]
"""For each character its drawings `[side, side]` uint8, bright on dark."""


class Drawings(NamedTuple):
    """Drawings of characters.

    Attributes:
        images: uint8 `[characters, most, side, side]`, bright on dark; 0 where a character has fewer drawings.
        counts: int64 `[characters]`, how many it has; they are the first ones.
        pools: numbers of a pool's characters, as a range; no script is in two of them.
    """

    images: Tensor
    counts: Tensor
    pools: dict[str, range]


@cache
def load_drawings(data: str, side: int) -> Drawings:
    """Drawings of characters as images of `side` x `side` pixels.

    Args:
        data: "dejavu", or "omniglot:FOLDER" with files `ALPHABET/CHARACTER/*.png` in the folder. Where it has
            `images_background` and `images_evaluation`, the latter's alphabets are for tests; otherwise a fifth of all.
            A tenth of the others, at least one, is for validation.
        side: of the images.
    Raises:
        ValueError: `data` is none of these, a pool would have no alphabet, or a file is no image.
        FileNotFoundError: there is no such folder, or none of such files in it.
        ImportError: matplotlib or Pillow is missing.
    """
    kind, _, path = data.partition(":")
    if data == "dejavu":
        # Greek has letters of Latin, which would be two classes that look the same.
        seen: set[bytes] = set()
        drawn = {pool: _leave_out(draw_scripts(scripts, side), seen) for pool, scripts in SCRIPTS.items()}
    elif kind == "omniglot" and path:
        drawn = {
            pool: [character for alphabet in alphabets for character in _read_alphabet(alphabet, side)]
            for pool, alphabets in _find_alphabets(Path(path).expanduser()).items()
        }
    else:
        choose("data", data, ["dejavu", "omniglot:FOLDER"])
    return _join(drawn, side)


def _leave_out(characters: Script, seen: set[bytes]) -> Script:
    """Those whose first drawing has not been seen."""
    kept = []
    for character in characters:
        first = character[0].tobytes()
        if first not in seen:
            seen.add(first)
            kept.append(character)
    return kept


def _join(drawn: dict[str, Script], side: int) -> Drawings:
    characters = [character for pool in POOLS for character in drawn[pool]]
    counts = [len(character) for character in characters]
    images = np.zeros((len(characters), max(counts), side, side), np.uint8)
    for i, character in enumerate(characters):
        images[i, : len(character)] = np.stack(character)
    pools, first = {}, 0
    for pool in POOLS:
        pools[pool] = range(first, first + len(drawn[pool]))
        first += len(drawn[pool])
    return Drawings(torch.from_numpy(images), torch.tensor(counts, dtype=torch.int64), pools)


# -- Omniglot's folders ------------------------------------------------------------------------------------------------


def _find_alphabets(folder: Path) -> dict[str, list[Path]]:
    """The folders of alphabets, by pool; divided at random, but always in the same way."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; it should hold files ALPHABET/CHARACTER/*.png")
    if all((folder / name).is_dir() for name in FOLDERS.values()):
        test, rest = (_list_folders(folder / FOLDERS[pool]) for pool in ("test", "train"))
        need = "images_background has {} of them, at least 2 are needed"
    else:
        rest = _list_folders(folder)
        held_out = max(1, len(rest) // 5)
        test, rest = rest[:held_out], rest[held_out:]
        need = "{} of them are left for training and validation, at least 2 are needed, and one for tests"
    if len(rest) < 2 or not test:
        raise ValueError(f"{folder} has too few alphabets for pools of their own: " + need.format(len(rest)))
    held_out = max(1, len(rest) // 10)
    return {"train": rest[held_out:], "outer_valid": rest[:held_out], "test": test}


def _list_folders(folder: Path) -> list[Path]:
    """The folders that hold folders of images, in an order that is random, but depends on their number only."""
    found = sorted({path.parent.parent for path in folder.glob("*/*/*.png")})
    if not found:
        raise FileNotFoundError(f"{folder} has no files ALPHABET/CHARACTER/*.png, which Omniglot's archives unpack to")
    order = torch.randperm(len(found), generator=make_generator(derive_seeds(0, "alphabets")))
    return [found[i] for i in order.tolist()]


def _read_alphabet(folder: Path, side: int) -> Script:
    characters = sorted({path.parent for path in folder.glob("*/*.png")})
    return [[_read_image(path, side) for path in sorted(character.glob("*.png"))] for character in characters]


def _read_image(path: Path, side: int) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(f"images in files are read by Pillow: {advise('train')}") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image that Pillow can read ({type(error).__name__}); get it anew") from error
    return 255 - pixels if pixels.mean() > PAPER else pixels
