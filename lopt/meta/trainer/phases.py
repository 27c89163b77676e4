"""What an outer loop costs: the time of each of its phases, and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up the wall-clock seconds of the parts of an outer loop; parts do not nest.

    On a GPU work is counted where it is waited for, so that `estimate` may end before its kernels do.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`, also where it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Seconds by phase as `NAME_seconds`, since they were taken last."""
        taken, self.seconds = self.seconds, {}
        return {f"{name}_seconds": value for name, value in taken.items()}


def measure_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had so far, in MiB: `peak_mib` of the host, `gpu_peak_mib` of a GPU.

    Empty where the system does not say.
    """
    found = {}
    try:
        import resource
        import sys
    except ImportError:  # not POSIX
        pass
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device.type == "cuda":
        found["gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
