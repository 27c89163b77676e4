"""One process at a time in a folder: in a run's as long as it is trained, so that who comes second is refused before it
has read anything; in a sweep's as long as it takes to claim a trial.

The lock is the system's own (`filelock`), so that it ends with the process that holds it, however that ends; what lies
in the folder afterwards blocks nothing. Commands that only read need none.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
OWNER = ".owner"
"""Who holds the lock, as a text for people; of no meaning while it is free."""


@contextmanager
def hold_folder(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder. A process that holds it already may hold it again.

    Args:
        folder: that exists.
        patient: wait for another process to leave it.
    Raises:
        ValueError: another process is there, and `patient` is false.
        OSError: there is no such folder, or it cannot be written.
    """
    if not folder.is_dir():  # which filelock would make
        raise FileNotFoundError(f"there is no folder {folder}")
    # One object for each path in this process: it counts how often it is held.
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=-1 if patient else 0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by {_read_owner(folder)}: wait for it, stop it, or choose another folder"
        ) from None
    try:
        (folder / OWNER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _read_owner(folder: Path) -> str:
    try:
        return (folder / OWNER).read_text(encoding="utf-8", errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
