"""What only a CUDA device tells: the kernels of a call, and how long its captured graph takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.timing import synchronize, time_queued

WARM_UPS = 3  # before a capture


class Launch(NamedTuple):
    """Something that the device did.

    Attributes:
        name: of the kernel, or what was copied or set.
        kind: "kernel", "gpu_memcpy" or "gpu_memset".
        seconds: how long it took.
    """

    name: str
    kind: str
    seconds: float


KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def record_launches(call: Callable[[], object], device: torch.device) -> list[Launch]:
    """All that the device does for one call, in order.

    Raises:
        RuntimeError: the device is no GPU.
    """
    if device.type != "cuda":
        raise RuntimeError(f"launches are counted on a CUDA device, not on {device}. Pass --device cuda.")
    _warm_up(device)
    return _record(call, device)


def _record(call: Callable[[], object], device: torch.device) -> list[Launch]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        return read_trace(file)


@cache
def _warm_up(device: torch.device) -> None:
    """The first profile of a process may miss what is launched while it sets itself up."""
    x = torch.ones(1, device=device, dtype=torch.float32)
    _record(x.neg_, device)


def read_trace(file: Path) -> list[Launch]:
    """What a device did, from a trace in Chrome's format, by the time at which it began."""
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("cat") in KINDS]
    return [Launch(e["name"], e["cat"], 1e-6 * e["dur"]) for e in sorted(events, key=lambda e: float(e["ts"]))]


def count_kernels(launches: Iterable[Launch]) -> int:
    """How many of them are kernels."""
    return sum(launch.kind == "kernel" for launch in launches)


def group_launches(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """Number, seconds and share of each name; those that take longest first."""
    found: dict[str, list[float]] = {}
    for launch in launches:
        found.setdefault(launch.name, []).append(launch.seconds)
    total = sum(map(sum, found.values())) or 1.0
    rows = [
        {"name": name, "launches": len(seconds), "seconds": sum(seconds), "share": sum(seconds) / total}
        for name, seconds in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def time_graph(call: Callable[[], object], repeats: int, seconds: float, device: torch.device) -> list[float]:
    """Seconds of each replay of a CUDA graph of the call, one queued behind the other.

    Raises:
        RuntimeError: the device is no GPU, or the call cannot be captured.
    """
    if device.type != "cuda":
        raise RuntimeError(f"a CUDA graph needs a CUDA device, not {device}. Pass --device cuda.")
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return time_queued(graph.replay, repeats, seconds, device)
