"""A program of its own: runs that are killed at random moments, gone on with, and compared with one that was not.

`python random_kills.py FOLDER ESTIMATOR KILLS SEED [compile]` prints how many were killed and how many ended equal. It
forks, so that torch is imported once, and so it must be a process without threads of others.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import torch.utils.tensorboard
from training_cases import describe_result, fit_init, make_config

from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import CONFIG, resume_run, start_run
from lopt.meta.trainer.log import RunLog


def make_run(estimator: str, compiled: bool) -> RunConfig:
    raw = make_config(steps=12, validate_every=4, checkpoint_every=3, learning_rate=0.03, patience=3).to_dict()
    raw["estimator"] = {"name": estimator, "num_steps": 4} | ({"compile": True} if compiled else {})
    return parse_config(fit_init(raw))


def fork_run(config: RunConfig, folder: Path) -> int:
    """Begin or go on with a run in a process of its own; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        (resume_run(folder)[1] if (folder / CONFIG).exists() else start_run(config, folder)).run()
        status = 0
    finally:
        os._exit(status)


def wait_for(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(root: Path, estimator: str, kills: int, seed: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    RunLog.figure = lambda *_: None  # type: ignore[method-assign]  # drawing would take most of the time
    warnings.simplefilter("ignore")
    config, chance = make_run(estimator, compiled), random.Random(seed)
    start_run(config, root / "first").run()  # what is imported, and compiled, then is in all that are forked
    begin = time.monotonic()
    assert wait_for(fork_run(config, root / "whole")) == 0
    duration = time.monotonic() - begin
    expected = describe_result(root / "whole")
    killed = equal = 0
    while killed < kills:
        folder = root / f"{killed}"
        process = fork_run(config, folder)
        time.sleep(chance.uniform(0, duration))
        os.kill(process, signal.SIGKILL)
        if wait_for(process) == 0:  # it was faster this time
            folder.rename(root / f"done-{time.monotonic_ns()}")
            continue
        killed += 1
        assert wait_for(fork_run(config, folder)) == 0
        equal += describe_result(folder) == expected
    sys.stdout.write(f"{estimator}: {killed} killed within {duration:.2f} s, {equal} equal\n")
    sys.exit(equal != killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), "compile" in sys.argv)
