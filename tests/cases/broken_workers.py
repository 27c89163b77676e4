"""Processes in the place of a sweep's workers, each with a fault of its own; without lopt, so that they start fast."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection


def answer(connection: Connection) -> None:
    """Works: says that the trial arrived."""
    while True:
        try:
            connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(b'[true, ""]')


def send_garbage(connection: Connection) -> None:
    connection.recv_bytes()
    connection.send_bytes(b"\x80\x04garbage")
    signal.pause()


def send_too_little(connection: Connection) -> None:
    connection.recv_bytes()
    connection.send_bytes(b"[true]")
    signal.pause()


def be_killed(connection: Connection) -> None:
    connection.recv_bytes()
    os.kill(os.getpid(), signal.SIGKILL)


def leave(connection: Connection) -> None:
    connection.recv_bytes()
    raise SystemExit(3)
