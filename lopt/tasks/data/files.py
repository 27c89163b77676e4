"""Data sets in local files: MNIST's IDX, CIFAR-10's binary version, plain text. Nothing is downloaded.

Sources: yann.lecun.com/exdb/mnist (IDX; Fashion-MNIST and others have the same files), cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lopt.tasks.base import Data

IDX_BYTES = 0x08
CIFAR_SHAPE = (3, 32, 32)


def read_mnist(folder: Path) -> tuple[Data, Data]:
    """The training and the test set in `folder`, from MNIST's four files, gzipped (`.gz`) or not.

    Returns:
        Twice images uint8 `[n, 1, height, width]` and classes int64 `[n]`.
    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file is not IDX, truncated or too long, or there are not as many classes as images.
    """
    sets = []
    for name in ("train", "t10k"):
        images = read_idx(_find(folder, f"{name}-images-idx3-ubyte"), 3)
        classes = read_idx(_find(folder, f"{name}-labels-idx1-ubyte"), 1)
        if len(images) != len(classes):
            raise ValueError(f"{folder}: {name} has {len(images)} images and {len(classes)} labels; get the files anew")
        sets.append((images[:, None], classes.long()))
    train, test = sets
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{folder}: images of {[list(x.shape[2:]) for x, _ in sets]} pixels are of two data sets")
    return train, test


def read_idx(path: Path, ndim: int) -> Tensor:
    """A file of MNIST's format, which holds one array of bytes and says its sizes.

    Args:
        path: of the file, gzipped if its name ends with `.gz`.
        ndim: dimensions that it must have.
    Returns:
        uint8, with the sizes of the header.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or less or more than its header says.
    """
    content = _read(path)
    if len(content) < 4 + 4 * ndim or content[:4] != bytes([0, 0, IDX_BYTES, ndim]):
        expected = bytes([0, 0, IDX_BYTES, ndim]).hex()
        raise ValueError(
            f"{path} is not an IDX file of {ndim}-dimensional bytes: it starts with {content[:4].hex() or 'nothing'}, "
            f"expected {expected} and {ndim} sizes"
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim)]
    data = content[4 + 4 * ndim :]
    if len(data) != prod(shape) or not data:
        how = "truncated" if len(data) < prod(shape) else "too long" if data else "empty"
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{path} is {how}: {sizes} = {prod(shape)} bytes expected, {len(data)} found; get it anew")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)


def read_cifar10(folder: Path) -> tuple[Data, Data]:
    """The training and the test set in `folder` (or its `cifar-10-batches-bin`), from the binary version's six files.

    Returns:
        Twice images uint8 `[n, 3, 32, 32]` and classes int64 `[n]`.
    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a file does not consist of whole records, or a label is not from 0 to 9.
    """
    # The archive unpacks into a folder of that name; users name either.
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    train = [_read_cifar_file(_find(folder, f"data_batch_{i}.bin")) for i in range(1, 6)]
    images, classes = zip(*train, strict=True)
    return (torch.cat(images), torch.cat(classes)), _read_cifar_file(_find(folder, "test_batch.bin"))


def _read_cifar_file(path: Path) -> Data:
    content, size = _read(path), 1 + prod(CIFAR_SHAPE)
    if len(content) % size or not content:
        raise ValueError(
            f"{path} has {len(content)} bytes, expected a multiple of {size} (label and image); get it anew"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
    classes = records[:, 0].long()
    if classes.max() > 9:
        raise ValueError(
            f"{path} has the label {classes.max()}, expected 0 to 9; is it CIFAR-100 or the Python version?"
        )
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), classes


def read_text(path: Path) -> str:
    r"""A text in UTF-8, with or without a byte order mark, gzipped if its name ends with `.gz`.

    Returns:
        The text, with `\n` as the end of a line, whatever it was in the file.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    content = _read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _find(folder: Path, name: str) -> Path:
    """The file called `name` or `name.gz`."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; it should hold {name} (or {name}.gz)")
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"{folder} has no {name} (or {name}.gz), only {names}; put the data set's files there")


def _read(path: Path) -> bytes:
    """What is in a file, decompressed if its name ends with `.gz`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not gzip ({error}); get it anew") from error
