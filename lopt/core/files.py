"""The format of everything that lopt writes to disk as tensors: rule files and training checkpoints.

A file is one `.safetensors` whose metadata has one entry, `lopt`, a JSON object (one, because safetensors does not
keep the order of several, and equal content shall give equal bytes):

    sha256   of the whole file with these 64 digits as zeros: a flipped bit anywhere is refused
    format   1; a higher number is refused
    version  of lopt, for the record
    kind     "rule" with `rule`, `config` and `card`, or "state" with `metadata`

The safetensors header is the manifest of names, shapes and dtypes. Nothing is ever unpickled. Writes are atomic.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as decode_tensors
from safetensors.torch import save as encode_tensors
from torch import Tensor

from lopt.core.documents import parse_json
from lopt.core.foreign_text import make_printable
from lopt.core.version import VERSION

FORMAT = 1
MAX_HEADER = 10_000_000  # bytes

_BLANK = "0" * 64


# -- training checkpoints ----------------------------------------------------------------------------------------------


def save_state(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    previous: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a training checkpoint: named tensors of any shape and dtype, and JSON metadata.

    The old file at the path stays whole until the new one is; equal content gives equal bytes.

    Args:
        previous: where the old file goes instead of being replaced.
    Returns:
        The path.
    Raises:
        ValueError: names and metadata exceed `MAX_HEADER` bytes.
        OSError: the file cannot be written.
    """
    return write_atomic(path, encode_file("state", tensors, {"metadata": dict(metadata)}), previous)


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, bit for bit, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a training checkpoint, or a damaged one, or one of a newer lopt.
    """
    about, tensors = read_file(Path(path), "state")
    metadata = about.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: its metadata is a {type(metadata).__name__}, expected a JSON object")
    return tensors, metadata


# -- the file ----------------------------------------------------------------------------------------------------------


def copy_to_host(value: Tensor) -> Tensor:
    """A tensor as files and checksums need it: outside of any graph, on the CPU, its numbers in order; a copy only
    where it is not so already.
    """
    return value.detach().cpu().contiguous()


def encode_file(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """The bytes of a file of lopt, a function of the content alone.

    Args:
        kind: "rule" or "state".
        tensors: of any shape and dtype, on any device; memory that they share is written for each of them.
        about: what the JSON object holds beside checksum, format, version and kind.
    Raises:
        ValueError: names and metadata exceed `MAX_HEADER` bytes.
    """
    head = {"sha256": _BLANK, "format": FORMAT, "version": VERSION, "kind": kind, **about}
    plain = {name: copy_to_host(value).clone() for name, value in tensors.items()}  # safetensors refuses shared memory
    data = encode_tensors(plain, {"lopt": json.dumps(head)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise ValueError(f"cannot save: names and metadata exceed {MAX_HEADER} bytes")
    return data.replace(_BLANK.encode(), sha256(data).hexdigest().encode(), 1)


def read_file(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object and the tensors of a file that is whole and of the expected kind; nothing in it is executed.

    Args:
        kind: "rule" or "state".
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another program, kind or newer format, truncated, or its checksum does not match.
    """
    data, head = _read_bytes(path)
    # The format comes first: a newer file may compute its checksum in another way.
    written = head.get("format")
    if type(written) is not int or written < 1:
        raise ValueError(f"{path} is damaged: its format is {make_printable(written)}, expected {FORMAT}")
    if written > FORMAT:
        version = make_printable(head.get("version"), 40)
        raise ValueError(
            f"{path} has format {make_printable(written, 20)}, written by lopt {version}; this is lopt {VERSION}, "
            f"which reads formats up to {FORMAT}. Upgrade lopt."
        )
    # The checksum covers the whole file, itself blanked; a changed letter case of its digits does not pass either.
    checksum = str(head.get("sha256"))
    if sha256(data.replace(checksum.encode(), _BLANK.encode(), 1)).hexdigest() != checksum:
        raise ValueError(f"{path} is damaged: its content does not match its checksum. Restore it from a copy.")
    if head.get("kind") != kind:
        names = {"rule": "a rule file", "state": "a training checkpoint"}
        other = make_printable(head.get("kind"), 40)
        raise ValueError(f"{path} is {names.get(other, other)}, expected {names[kind]}")
    try:
        return head, decode_tensors(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {make_printable(error)}") from error


def _read_bytes(path: Path) -> tuple[bytes, dict[str, Any]]:
    """All bytes of a safetensors file of lopt, and its JSON object, before the checksum is checked.

    No more is read than a header of at most `MAX_HEADER` bytes announces.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a .safetensors file")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    with file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER or start[8:] != b"{":
            raise ValueError(f"{path} is not a safetensors file but {_guess_kind(start)}. Nothing of it was executed.")
        if size < 8 + length:
            raise ValueError(f"{path} is truncated: it ends within its header, after {size} bytes")
        header = start[8:] + file.read(length - 1)
        head, end = _parse_header(header, path)
        if size != 8 + length + end:
            raise ValueError(f"{path} is truncated or damaged: expected {8 + length + end} bytes, found {size}")
        return start[:8] + header + file.read(end), head


def _parse_header(header: bytes, path: Path) -> tuple[dict[str, Any], int]:
    """lopt's JSON object, and the number of bytes that the tensors take."""
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        head = parse_json(metadata["lopt"]) if "lopt" in metadata else None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = make_printable(repr(error))
        raise ValueError(f"{path} is damaged: its header cannot be read ({reason})") from error
    if not isinstance(head, dict):
        raise ValueError(f"{path} is a safetensors file, but not one of lopt (no 'lopt' in its metadata)")
    return head, end


def _guess_kind(start: bytes) -> str:
    """What a file seems to be, by its first bytes."""
    if not start:
        return "empty"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch.save writes (.pt, .pth)"
    if start.startswith(b"\x80") and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle"
    if start.startswith(b"\x93NUMPY"):
        return "a NumPy array"
    return f"something else (it starts with {start!r})"


def write_atomic(path: str | os.PathLike[str], data: bytes, previous: str | os.PathLike[str] | None = None) -> Path:
    """Replace the file at `path` by `data`; after a kill at any time it is the old or the new one, whole.

    Written under a temporary name in the same folder, synchronised, then renamed. What killed processes left behind
    is removed by the next write to the same path. Two threads must not write one path at the same time.

    Args:
        previous: of the same folder; the old file is renamed to it when the new one is whole. A kill between the two
            renames leaves no file at `path`.
    Returns:
        The path.
    Raises:
        OSError: the file cannot be written (no such folder, read-only, disk full); the old one is unchanged.
    """
    path = Path(path)
    target = path.resolve()  # a symbolic link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _remove_stale(target)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and target.exists():
            os.replace(target, previous)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}; nothing was changed", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return path


def _remove_stale(target: Path) -> None:
    """Remove temporary files of `target` whose process no longer runs."""
    for temporary in target.parent.glob(f".{escape(target.name)}.*.tmp"):
        process = temporary.name.split(".")[-2]
        if process.isdecimal() and not _is_running(int(process)):
            temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there, signal 0 is not harmless
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
