"""Tiles that were measured on a GPU, kept in one small file of the user's; where none was, the default.

Kernels work in place and reach their tensors through a table of pointers: `triton.autotune` would repeat launches on
live data, and its key cannot see through the table. So nothing is measured where a kernel is used. `python -m bench
tune` measures, on copies, and `store`s; `find` reads.

The file is `tiles.json` in `$LOPT_CACHE`, else `$XDG_CACHE_HOME/lopt`, else `~/.cache/lopt`. It is read once per
process. Another tile may add in another order, so that sums differ in their last bits: replicas that must stay equal
bit for bit need the same file, or none.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lopt_kernels.launching.language import triton

NAME = "tiles.json"
FORMAT = "lopt tiles 1"
RETRY = "Remove it, and run `python -m bench tune` again."


class Tile(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        block: elements that a program takes at once; a power of two.
        steps: how often, at most.
        warps: threads of a program / 32; a power of two.
    """

    block: int
    steps: int
    warps: int = 4


def sign(*parts: object) -> str:
    """What a kernel is specialised to, as one line of text: that of each part.

    It is in the key under which `store` keeps a tile and `find` looks for it: kernels that need tiles of their own must
    print differently.
    """
    return "; ".join(map(str, parts))


def find(op: str, signature: str, default: Tile, device: torch.device) -> Tile:
    """The tile that was measured to be best, or the default. Nothing is measured here.

    Args:
        op: its name.
        signature: of `sign`: family, shape, precision, dtype of the parameters.
        device: of the tensors. If it is no GPU, the default is returned and no file is touched.
    Warns:
        UserWarning: once per process, if there is a file that cannot be used: defaults are used then.
    """
    gpu = name_gpu(device)
    return default if gpu is None else _load(find_file()).get(_join(gpu, op, signature), default)


def store(op: str, signature: str, tile: Tile, device: torch.device, **figures: float) -> Path:
    """Keep a tile for `find`, beside all others that the file has; later ones in this process find it, too.

    A file that cannot be used is put aside under the name `tiles.json.unusable`. The new one is written under a
    temporary name and renamed, so that a reader finds the old or the new one, whole. Two that store at the same time:
    the later one wins.

    Args:
        figures: what was measured, for people who read the file.
    Returns:
        The file.
    Raises:
        ValueError: the device is no GPU, or the tile is none.
        OSError: the file cannot be written; the old one is unchanged.
    """
    gpu, file = name_gpu(device), find_file()
    if gpu is None:
        raise ValueError(f"a tile is stored for a CUDA device, got {device}. Tune on a GPU.")
    # what others have stored is kept; a file that is not ours to read is kept, too, under another name
    try:
        known = _read(file)
    except ValueError:
        os.replace(file, file.with_name(f"{NAME}.unusable"))
        known = {}
    # checked before anything is written: a file that `_read` refuses would lose all its tiles
    new = tile._asdict() | figures
    _check(new)
    known[_join(gpu, op, signature)] = new
    text = json.dumps({"format": FORMAT, "tiles": dict(sorted(known.items()))}, indent=1)
    # in the same folder, so that the rename stays on one file system and is atomic
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{NAME}.")
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    # kernels launched from now on in this process find the new tile
    _load.cache_clear()
    return file


def find_file() -> Path:
    """The file that `find` reads and `store` writes.

    `tiles.json` in `$LOPT_CACHE`, else in `lopt` below `$XDG_CACHE_HOME` or `~/.cache`. It need not exist.
    """
    return find_cache() / NAME


def find_cache() -> Path:
    """The user's folder for what is measured or compiled once per machine; it need not exist."""
    # read at every call, not at import: they may be set later
    own, shared = os.environ.get("LOPT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(shared or os.path.expanduser("~/.cache"), "lopt"))


def name_gpu(device: torch.device) -> str | None:
    """What a measurement is true of beside the kernel: name and capability of the GPU, and Triton's version.

    It is the first part of a tile's key. None where nothing can be measured: no GPU, or no Triton.
    """
    if device.type != "cuda" or triton is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} | {major}.{minor} | triton {triton.__version__}"


def _join(gpu: str, op: str, signature: str) -> str:
    return " | ".join((gpu, op, signature))


@cache
def _load(file: Path) -> dict[str, Tile]:
    """All tiles of a file; none, with a warning, if it cannot be used."""
    try:
        return {key: Tile(*(entry[name] for name in Tile._fields)) for key, entry in _read(file).items()}
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is ignored, kernels use their default tiles: {error}. {RETRY}", stacklevel=3)
        return {}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file; none if there is no file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what `store` writes.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tiles"), dict):
        raise ValueError(f'expected a JSON object with "format": "{FORMAT}" and "tiles"')
    for entry in content["tiles"].values():
        _check(entry)
    entries: dict[str, dict[str, Any]] = content["tiles"]
    return entries


def _check(entry: Any) -> None:
    """An entry has a tile.

    Raises:
        ValueError: it has not.
    """
    # bools are ints to Python, and a file may hold anything: types are compared exactly
    numbers: list[Any] = [entry.get(name) for name in Tile._fields] if isinstance(entry, dict) else [None]
    counts = all(type(n) is int and n > 0 for n in numbers)
    if not counts or any(n & (n - 1) for n in numbers[::2]):
        raise ValueError(f"expected block and warps (powers of two) and steps (at least 1) of a tile, got {entry!r}")
