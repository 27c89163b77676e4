"""The device of a run, by its name in a configuration.

A name is checked before anything is built, and looked for only where the run is, so that a configuration for a GPU can
be checked on a machine without one.
"""

from __future__ import annotations

import os
import re

import torch

KNOWN = re.compile(r"cpu|cuda(:\d+)?")


def check_device(name: str) -> str:
    """`name` itself, if it is that of a device, whether or not this machine has it.

    Args:
        name: as in `trainer.device`: "cpu", "cuda" or "cuda:1".
    Raises:
        ValueError: it is none of these.
    """
    if not KNOWN.fullmatch(name):
        raise ValueError(f'trainer.device must be "cpu", "cuda" or a GPU by its number such as "cuda:1", got {name!r}')
    return name


def find_device(name: str) -> torch.device:
    """The device of this process, by the name that all processes of a run have in common.

    Args:
        name: "cpu", "cuda:1", or "cuda": the first GPU, or under torchrun the one of the process's LOCAL_RANK.
    Raises:
        ValueError: the name is none of a device, or this machine has no such device; the message says which it has.
    """
    if check_device(name) == "cpu":
        return torch.device("cpu")
    # torchrun numbers the processes of a host; "cuda" alone gives each of them a GPU of its own.
    local_rank = os.environ.get("LOCAL_RANK") if name == "cuda" else None
    device = torch.device("cuda", int(local_rank or 0)) if name == "cuda" else torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index < count:
        return device

    gpus = ", ".join(f"cuda:{i}" for i in range(count)) or "no GPU that torch can use"
    if local_rank and count:
        advice = f"start at most {count} processes on this host (--nproc-per-node), or name one GPU for all"
    else:
        advice = 'choose one of them, or "cpu"' if count else 'set trainer.device to "cpu" (--device cpu)'
    raise ValueError(f"trainer.device = {name!r} needs {device}, but this machine has {gpus}: {advice}")
