"""Worker processes of a sweep: they run trials one after the other, and end with the process that made them.

What goes wrong in a trial, or with a worker itself, is how that trial ended, and nothing else: the sweep goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from lopt.cli.sweep.trials import Trial
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import CONFIG, resume_run, start_run
from lopt.meta.runs.lock import hold_folder
from lopt.meta.runs.memory import explain_memory
from lopt.meta.trainer.trainer import Interrupted

OUTPUT = "output.txt"


class Outcome(NamedTuple):
    """How a trial's stretch of running ended: neither arrived nor with an error if it was stopped by a signal.

    Attributes:
        arrived: at the step that it was to come to, or at its end.
        error: in one line; "" for none.
    """

    arrived: bool
    error: str


class Worker:
    """A process that runs trials one after the other, so that torch is imported once for all of them, and that ends
    with the process that made it. It talks through a pipe, in dicts and texts. A process that is gone is replaced when
    the next trial begins.

    Attributes:
        trial: the one that it runs now, or ran last.
        process, connection: its process, and this end of the pipe.
    """

    trial: Trial

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_trials, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, trial: Trial, config: RunConfig, folder: Path, until: int) -> None:
        """Have the worker begin a trial, or go on with it; returns at once.

        Args:
            trial: whose configuration is `config` and whose run is in `folder`.
            until: outer step at which it pauses; 0: runs to its end.
        """
        if not self.process.is_alive():
            self.connection.close()
            self._start()
        self.trial = trial
        with suppress(OSError):  # it is gone: `finish` will say so
            self.connection.send_bytes(json.dumps([config.to_dict(), str(folder), until]).encode())

    def finish(self) -> tuple[Trial, Outcome]:
        """Take the result of a trial, once there is something to read from the connection.

        Returns:
            The trial, and how it ended; a process that died counts as an error that names the signal or status, and
            so does one that sends something else than an outcome.
        """
        try:
            arrived, error = json.loads(self.connection.recv_bytes())
            return self.trial, Outcome(bool(arrived), str(error))
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode or 0
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            return self.trial, Outcome(False, f"its process {how}")
        except (ValueError, TypeError) as error:
            self.process.kill()  # whatever it goes on to do, it is out of step
            self.process.join()
            return self.trial, Outcome(False, f"its process sent no outcome: {error}")


@contextmanager
def start_workers(count: int) -> Iterator[list[Worker]]:
    """Workers that are idle, for as long as the context lasts.

    Their pipes are closed at its end; a worker that still runs a trial has it save its state and ends with this
    process.

    Args:
        count: of processes.
    """
    workers = [Worker() for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()


def serve_trials(connection: Connection) -> None:
    """What a worker process does: run the trials that are asked for, until the pipe is closed.

    What they print is left in `OUTPUT` in the trial's folder. An exception ends the trial, not the worker.

    Args:
        connection: receives configuration, folder and last step, answers with an `Outcome`; all as JSON.
    """
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent, which passes it on
    while True:
        try:
            raw, name, until = json.loads(connection.recv_bytes())
        except EOFError:
            return
        folder = Path(name)
        try:
            folder.mkdir(exist_ok=True)
            with (folder / OUTPUT).open("a", encoding="utf-8") as output:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(output.fileno(), stream.fileno())
            outcome = Outcome(run_trial(parse_config(raw), folder, until), "")
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome(False, f"{type(error).__name__}: {error}".splitlines()[0])
        connection.send_bytes(json.dumps(outcome).encode())


def run_trial(config: RunConfig, folder: Path, until: int) -> bool:
    """Begin the run in `folder`, or go on with it, to step `until` or (0) to its end; returns whether it came there.

    If not, a signal stopped it, or the parent of this process is gone; its state is saved.
    """
    parent = multiprocessing.parent_process()
    with hold_folder(folder, patient=True):  # the process of a sweep that was killed may not have ended yet
        trainer = resume_run(folder)[1] if (folder / CONFIG).exists() else start_run(config, folder)
        if 0 < until <= trainer.step:
            trainer.mend_rule()  # trials are ranked by the cards of their rules
            return True

        def watch(_: object) -> None:
            if 0 < trainer.step == until or (parent is not None and not parent.is_alive()):
                signal.raise_signal(signal.SIGTERM)

        try:
            with explain_memory(config.to_dict()):
                trainer.run(watch)
        except Interrupted:
            return 0 < trainer.step == until
        return True
