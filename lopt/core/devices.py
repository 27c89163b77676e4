"""The device of a run, by its name in a configuration; checked before anything is built on it."""

from __future__ import annotations

import os
import re

import torch

KNOWN = re.compile(r"cpu|cuda(:\d+)?")


def check_device(name: str) -> str:
    """`name` itself, if it is one of a device, whether or not this machine has it.

    Raises:
        ValueError: it is not.
    """
    if not KNOWN.fullmatch(name):
        raise ValueError(f'trainer.device must be "cpu", "cuda" or a GPU by its number such as "cuda:1", got {name!r}')
    return name


def find_device(name: str) -> torch.device:
    """The device of this process. "cuda" is the first GPU, or under torchrun the one of the process's LOCAL_RANK.

    Raises:
        ValueError: there is no such device.
    """
    if check_device(name) == "cpu":
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK") if name == "cuda" else None
    device = torch.device("cuda", int(local or 0)) if name == "cuda" else torch.device(name)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index < there:
        return device
    gpus = ", ".join(f"cuda:{i}" for i in range(there)) or "no GPU that torch can use"
    if local and there:
        advice = f"start at most {there} processes on this host (--nproc-per-node), or name one GPU for all"
    else:
        advice = 'choose one of them, or "cpu"' if there else 'set trainer.device to "cpu" (--device cpu)'
    raise ValueError(f"trainer.device = {name!r} needs {device}, but this machine has {gpus}: {advice}")
