"""The data of the families: sets that come with Python and scikit-learn, and local files, each in four splits.

Which one is meant is said by one string: a name such as "digits", or a format and where it lies, such as "mnist:PATH".
Splits do not depend on anything but the data. Pixels are in [0, 1] as float32 or, to save memory, in [0, 255] as uint8;
`to_pixels` makes them equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.core.installation import advise
from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.tasks.base import SPLITS, Data
from lopt.tasks.data.files import read_cifar10, read_mnist, read_text

Splits = dict[str, Data]

PATCH = 8
TABLE_HELD_OUT = {"wine": 20, "iris": 15, "breast_cancer": 60, "diabetes": 50}
"""Tables and the examples in each of their three small splits."""

BLOCK, MIN_TEXT = 2048, 960
"""Characters of a text that stay in one split, and the fewest that can be divided."""


# -- images ------------------------------------------------------------------------------------------------------------


@cache
def load_images(data: str) -> Splits:
    """Images with classes in four splits.

    Args:
        data: "digits" (8 x 8, 10 classes), "patches" (of photographs, 8 x 8 in colour, 8 classes), "mnist:FOLDER" (IDX
            files; also Fashion-MNIST and others of the same form) or "cifar10:FOLDER" (binary version). The test split
            of those in files is their own; the rest is divided 10 : 1 : 1.
    Returns:
        For each split images `[n, channels, height, width]`, float32 or uint8, and classes `[n]`, int64.
    Raises:
        ValueError: `data` is none of these, or a file is not what it should be.
        FileNotFoundError: a file is missing.
        ImportError: scikit-learn or Pillow is missing.
    """
    embedded: dict[str, Callable[[], Splits]] = {"digits": _load_square_digits, "patches": load_patches}
    readers = {"mnist": read_mnist, "cifar10": read_cifar10}
    kind, _, path = data.partition(":")
    if data in embedded:
        return embedded[data]()
    if kind not in readers or not path:
        choose("data", data, [*embedded, *(f"{key}:FOLDER" for key in readers)])
    (x, y), test = readers[kind](Path(path).expanduser())
    held_out = len(x) // 12
    if held_out == 0:
        raise ValueError(f"{path} has {len(x)} training images, too few for three splits (12 at least)")
    order = torch.randperm(len(x), generator=make_generator(derive_seeds(0, "splits")))
    numbers = torch.split(order, [len(x) - 2 * held_out, held_out, held_out])
    return {split: (x[i], y[i]) for split, i in zip(SPLITS[:3], numbers, strict=True)} | {"test": test}


def to_pixels(x: Tensor) -> Tensor:
    """Pixels in [0, 1] float32 from bytes in [0, 255]; floating-point pixels come back as they are.

    Data sets keep bytes, so this runs on each mini-batch.
    """
    return x.float() / 255 if x.dtype == torch.uint8 else x


@cache
def load_digits() -> Splits:
    """The digits in four splits, stratified by class: 1,437 train and 120 for each of the others.

    Returns:
        For each split images `[n, 64]` float32 in [0, 1] and classes `[n]` int64.
    Raises:
        ImportError: scikit-learn, of the extra `train`, is missing.
    """
    images, classes = _import_sklearn("datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    return _divide(x, y, 120, stratify=True)


def _load_square_digits() -> Splits:
    return {split: (x.view(-1, 1, 8, 8), y) for split, (x, y) in load_digits().items()}


@cache
def load_photographs() -> Tensor:
    """scikit-learn's photographs, a temple and a flower, for families on pictures rather than on sets of them.

    Returns:
        uint8 `[2, 3, 427, 640]`: photograph, colour, row, column.
    Raises:
        ImportError: scikit-learn or Pillow, of the extra `train`, is missing.
    """
    images = _import_sklearn("datasets").load_sample_images().images
    return torch.stack([torch.tensor(image, dtype=torch.uint8) for image in images]).permute(0, 3, 1, 2).contiguous()


@cache
def load_patches() -> Splits:
    """The photographs cut into tiles of 8 x 8 pixels: 6,380 train and 700 for each of the others, stratified.

    A tile's class is where it is from: one of the quarters of one of the photographs. Neighbours look alike, so the
    splits are not independent; and of tiles of sky or leaf nobody could say the quarter.

    Returns:
        For each split images `[n, 3, 8, 8]` uint8 and classes `[n]` int64 from 0 to 7.
    Raises:
        ImportError: scikit-learn or Pillow is missing.
    """
    tiles = load_photographs().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    photographs, _, rows, columns = tiles.shape[:4]
    low = (torch.arange(rows) >= rows // 2).long()
    right = (torch.arange(columns) >= columns // 2).long()
    quarter = 2 * low[:, None] + right
    classes = 4 * torch.arange(photographs)[:, None, None] + quarter
    x = tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, PATCH, PATCH)
    return _divide(x, classes.flatten(), 700, stratify=True)


# -- tables ------------------------------------------------------------------------------------------------------------


@cache
def load_table(data: str) -> Splits:
    """One of scikit-learn's small tables in four splits, standardised by the train split.

    Args:
        data: "wine" (13 features, 3 classes), "iris" (4 features, 3 classes), "breast_cancer" (30 features, 2 classes)
            or "diabetes" (10 features, regression).
    Returns:
        For each split features `[n, f]` float32 and classes `[n]` int64, stratified, or for diabetes targets `[n, 1]`
        float32, standardised, too.
    Raises:
        ValueError: `data` is none of these.
        ImportError: scikit-learn is missing.
    """
    choose("data", data, TABLE_HELD_OUT)
    features, targets = getattr(_import_sklearn("datasets"), f"load_{data}")(return_X_y=True)
    regression = data == "diabetes"
    y = torch.tensor(targets, dtype=torch.float64 if regression else torch.int64)
    y = y[:, None] if regression else y
    table = _divide(torch.tensor(features, dtype=torch.float64), y, TABLE_HELD_OUT[data], stratify=not regression)
    x_train, y_train = table["train"]

    def standardise(x: Tensor, by: Tensor) -> Tensor:
        return ((x - by.mean(0)) / by.std(0)).float()

    return {
        split: (standardise(x, x_train), standardise(y, y_train) if regression else y)
        for split, (x, y) in table.items()
    }


def _divide(x: Tensor, y: Tensor, held_out: int, *, stratify: bool) -> Splits:
    """`held_out` examples for each of the last three splits, the rest for the first."""
    train_test_split = _import_sklearn("model_selection").train_test_split
    numbers, undivided = [], torch.arange(len(y)).numpy()
    for size in (3 * held_out, 2 * held_out, held_out):  # held out of what is left, each from the one before
        labels = y[undivided] if stratify else None
        one_split, undivided = train_test_split(undivided, test_size=size, stratify=labels, random_state=0)
        numbers.append(torch.from_numpy(one_split))
    numbers.append(torch.from_numpy(undivided))
    return {split: (x[i], y[i]) for split, i in zip(SPLITS, numbers, strict=True)}


def _import_sklearn(module: str) -> Any:
    try:
        import sklearn.datasets
        import sklearn.model_selection
    except ImportError as error:
        raise ImportError(f"the data come with scikit-learn: {advise('train')}") from error
    return getattr(sklearn, module)


# -- text --------------------------------------------------------------------------------------------------------------


@cache
def load_text(data: str, characters: int) -> tuple[dict[str, Tensor], str]:
    """A text as codes of characters in four splits: 80 % train and the rest shared equally.

    The text is cut into blocks (of 2,048 characters if it is long enough), which are dealt out at random and joined.

    Args:
        data: "pydoc", the language reference in the running Python's `pydoc_data.topics` (465,126 characters in 3.11;
            other versions differ), or "text:FILE", any UTF-8 file.
        characters: the codes: 1 and up for the train split's most frequent characters, 0 for any other.
    Returns:
        For each split codes `[n]` uint8; and the characters with the codes from 1.
    Raises:
        ValueError: `data` is none of these, the file is not UTF-8, or the text is too short.
        FileNotFoundError: the file is missing.
    """
    kind, _, path = data.partition(":")
    if not 2 <= characters <= 256:
        raise ValueError(f"characters must be from 2 to 256, got {characters}")
    if data == "pydoc":
        text = _read_topics()
    elif kind == "text" and path:
        text = read_text(Path(path).expanduser())
    else:
        raise ValueError(f"data must be pydoc or text:FILE, got {data!r}")
    if len(text) < MIN_TEXT:
        raise ValueError(f"{data} has {len(text)} characters, too few for four splits ({MIN_TEXT} at least)")
    # Blocks, not four stretches: a book's end is not like its beginning, and splits should be alike.
    size = min(BLOCK, len(text) // 15)
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    order = torch.randperm(len(blocks), generator=make_generator(derive_seeds(0, "splits")))
    held_out = len(blocks) // 15
    numbers = torch.split(order, [len(blocks) - 3 * held_out, held_out, held_out, held_out])
    texts = {split: "".join(blocks[i] for i in indices) for split, indices in zip(SPLITS, numbers, strict=True)}
    # From the train split alone, as a vocabulary is learned, too; equally frequent characters are in their own order.
    ranked = sorted(Counter(texts["train"]).items(), key=lambda item: (-item[1], item[0]))
    vocabulary = "".join(character for character, _ in ranked[: characters - 1])
    codes = {character: code for code, character in enumerate(vocabulary, 1)}
    return {
        split: torch.tensor([codes.get(c, 0) for c in text], dtype=torch.uint8) for split, text in texts.items()
    }, vocabulary


def _read_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError("this Python comes without pydoc_data; give a text of your own, data='text:FILE'") from error
    return "\n\n".join(topics[key] for key in sorted(topics))
