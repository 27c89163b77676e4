"""Files of foreign weights: flax's msgpack, numpy archives, and what `torch.save` wrote of tensors.

A file is read once and not beyond `MAX_BYTES`, unpacked or not; nothing larger is allocated, whatever shapes it claims.
Nothing is ever unpickled but tensors, by torch's restricted reader. Headers and archives are parsed by numpy, zipfile
and msgpack; what is here bounds them, as their own readers allocate what a header claims before they look for the data.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from hashlib import sha256
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.core.foreign_text import make_line
from lopt.core.installation import advise

MAX_BYTES = 1 << 27  # VeLO's release has 10 million
MAX_NUMBERS = MAX_BYTES // 4
MAX_TENSORS = 10_000
MAX_DEPTH = 16
MAX_NAME = 200
MAX_DIMS = 8
NDARRAY = 1  # flax's extension type of an array: msgpack of (shape, dtype name, bytes)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPECTED = "expected flax msgpack, a numpy .npz archive or what torch.save wrote of a dict of tensors"


class Weights:
    """The tensors of a foreign file, taken one by one by whoever knows what they mean, so that none is overlooked.

    Args:
        tensors: by name.
        where: the file, for messages.
        checksum: its sha256 in hexadecimal.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str, checksum: str = "") -> None:
        self.tensors, self.where, self.checksum = dict(tensors), where, checksum
        self.taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int | None) -> Tensor:
        """One tensor, checked to have the shape that a rule needs, and noted as taken.

        Args:
            name: its path in the file, "a/b/c".
            shape: None stands for any size.
        Raises:
            ValueError: there is none, or it has another shape.
        """
        if name not in self.tensors:
            names = ", ".join(sorted(self.tensors)[:4])
            raise ValueError(f"{self.where}: expected a tensor {name!r}, found {names}, ... Is this the right rule?")
        value = self.tensors[name]
        sizes, wanted = list(value.shape), ["any" if size is None else size for size in shape]
        if len(sizes) != len(wanted) or any(w not in ("any", size) for w, size in zip(wanted, sizes, strict=True)):
            raise ValueError(f"{self.where}: {name} has shape {sizes}, expected [{', '.join(map(str, wanted))}]")
        self.taken.add(name)
        return value

    def check_all_taken(self, rule: str) -> None:
        """Make sure that nothing in the file was ignored, once a rule has taken what it knows.

        Args:
            rule: its name, for the message.
        Raises:
            ValueError: the file holds tensors that nobody asked for.
        """
        untaken = sorted(self.tensors.keys() - self.taken)
        if untaken:
            more = f" and {len(untaken) - 4} more" if len(untaken) > 4 else ""
            raise ValueError(
                f"{self.where} holds {', '.join(untaken[:4])}{more}, which rule {rule!r} does not have. "
                "Is this the right rule?"
            )

    def count_taken(self) -> int:
        """How many numbers the taken tensors have together, which may be more than the rule keeps: released files hold
        weights without effect.
        """
        return sum(self.tensors[name].numel() for name in self.taken)


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """All tensors of a file as float32, named by their path in it ("a/b/c"), without a leading "theta/".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, too large or of an unknown kind, or holds something else than finite
            floating-point tensors.
        ImportError: it is flax's, and msgpack is not installed.
    """
    path = Path(path)
    # A pipe or a device would be read without end, so only plain files are opened, and no more than is announced.
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file of weights")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, expected a file of weights")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than the {MAX_BYTES} that weights of a rule may have")
        data = file.read(size)
    if not data:
        raise ValueError(f"{path} is empty; {EXPECTED}")
    # By the first bytes, not by the name: released files are called as their authors like.
    if data[:1] == b"\x80" and len(data) > 1:  # in msgpack an empty map, after which nothing may come
        raise ValueError(f"{path} is a bare pickle, of which nothing was executed; {EXPECTED}")
    kind, read = ("a zip archive", _read_zip) if data.startswith(b"PK") else ("flax msgpack", _read_msgpack)
    try:
        tree = read(data)
    except ImportError:
        raise
    except Exception as error:  # the readers have many ways to refuse, without a common base
        raise ValueError(f"{path} cannot be read as {kind}: {make_line(error)}; {EXPECTED}") from error
    try:
        # What the readers gave is still foreign: names, types, sizes and numbers are checked before a rule sees them.
        tensors = _flatten(tree)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {make_line(error)}") from error
    return Weights(tensors, str(path), sha256(data).hexdigest())


# -- what is in a file -------------------------------------------------------------------------------------------------


def _flatten(tree: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts in their order, checked before anything is allocated for them."""
    tensors: dict[str, Tensor] = {}
    total = 0
    for path, value in _walk(tree, "", 0):
        name = path.removeprefix("theta/")
        if name in tensors:
            raise ValueError(f"two tensors are called {name}")
        _check_tensor(name or "the content", value)
        total += value.numel()
        if total > MAX_NUMBERS or len(tensors) == MAX_TENSORS:
            raise ValueError(f"holds more than {MAX_NUMBERS} numbers or {MAX_TENSORS} tensors, as no rule does")
        tensors[name] = value.detach().float()
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds nan or inf, expected finite float32 numbers")
    return tensors


def _walk(tree: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Names and leaves; an empty dict is a leaf, so that there are no more nodes than leaves times `MAX_DEPTH`."""
    if not isinstance(tree, Mapping) or not tree:
        yield name, tree
        return
    if depth == MAX_DEPTH:
        raise ValueError(f"dicts are nested more than {MAX_DEPTH} deep, expected tensors in nested dicts")
    for key, value in tree.items():
        if not isinstance(key, str) or len(key) > MAX_NAME or not key.isprintable():
            raise ValueError(f"a name is {repr(key)[:60]}, expected text of at most {MAX_NAME} characters")
        yield from _walk(value, f"{name}/{key}" if name else key, depth + 1)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected tensors in nested dicts")
    if value.dtype not in DTYPES.values():
        raise ValueError(
            f"{name} has dtype {str(value.dtype).removeprefix('torch.')}, expected one of {', '.join(DTYPES)}"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} is {value.layout} on {value.device}, expected a dense tensor that holds its numbers")


# -- kinds of files ----------------------------------------------------------------------------------------------------


def _read_zip(data: bytes) -> Any:
    """A numpy archive, if all entries are arrays, or a PyTorch file."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > MAX_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, more than {MAX_BYTES}")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise ValueError("an entry is compressed as numpy and PyTorch never do")
        if not all(entry.filename.endswith(".npy") for entry in entries):
            return _read_torch(data)
        chosen = [entry for entry in entries if entry.filename.startswith("theta/")] or entries
        return {entry.filename.removesuffix(".npy"): _read_entry(archive, entry) for entry in chosen}


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as stream:
        data = stream.read(entry.file_size)  # without a number it unpacks what the entry says, and more
    try:
        return _read_npy(data)
    except ValueError as error:
        raise ValueError(f"{entry.filename}: {error}") from error


def _read_npy(data: bytes) -> Tensor:
    """One array. numpy's own reader allocates what a header claims, before it looks for the numbers."""
    import numpy as np
    from numpy.lib import format as npy

    stream = BytesIO(data)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format, expected (1, 0) or (2, 0)")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if dtype.name not in DTYPES:
        raise ValueError(f"an array of {dtype}, expected one of {', '.join(DTYPES)}")
    _check_size(shape, dtype.itemsize, len(data) - stream.tell(), dtype.name)
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _read_torch(data: bytes) -> Any:
    try:
        return torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        code = re.search(r"GLOBAL \S+", str(error))
        reason = f"it asks for {code[0].removeprefix('GLOBAL ')}" if code else make_line(error)
        raise ValueError(f"not a PyTorch file of tensors alone, nothing of it was executed: {reason}") from error


def _read_msgpack(data: bytes) -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise ImportError(f"reading flax weights needs msgpack: {advise('train')}") from error

    def decode_array(code: int, data: bytes) -> Tensor:
        if code != NDARRAY:
            raise ValueError(f"unknown extension type {code}")
        shape, dtype, raw = msgpack.unpackb(data, max_array_len=MAX_DIMS, max_map_len=0)
        if dtype not in DTYPES:
            raise ValueError(f"an array of {dtype}, expected one of {', '.join(DTYPES)}")
        _check_size(shape, DTYPES[dtype].itemsize, len(raw), dtype)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(shape)

    def build_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    return msgpack.unpackb(
        data, ext_hook=decode_array, object_pairs_hook=build_dict, max_array_len=0, max_map_len=MAX_TENSORS
    )


def _check_size(shape: Any, itemsize: int, size: int, dtype: str) -> None:
    if prod(shape) * itemsize != size or not size:
        raise ValueError(f"an array of {dtype} and shape {list(shape)} with {size} bytes")
