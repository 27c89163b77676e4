"""Seconds per call, and how fast the memory is that calls are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

MIN_REPEATS = 3


class Times(NamedTuple):
    """Seconds of each call.

    Attributes:
        done: until the device is done.
        returned: until the call returns; on the CPU the same.
        cpu: of the process's CPU time, which other processes lengthen less.
    """

    done: list[float]
    returned: list[float]
    cpu: list[float]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], repeats: int, seconds: float, device: torch.device) -> Times:
    """Time calls one by one: `repeats` of them, or as many as start within `seconds`, but at least `MIN_REPEATS`."""
    times = Times([], [], [])
    synchronize(device)
    begin = time.perf_counter()
    while len(times.done) < repeats and (len(times.done) < MIN_REPEATS or time.perf_counter() - begin < seconds):
        start, cpu = time.perf_counter(), time.process_time()
        call()
        times.returned.append(time.perf_counter() - start)
        synchronize(device)
        times.done.append(time.perf_counter() - start)
        times.cpu.append(time.process_time() - cpu)
    return times


def time_queued(call: Callable[[], object], repeats: int, seconds: float, device: torch.device) -> list[float]:
    """Seconds of calls that the device has waiting one behind the other, as in training; on the CPU as `time_calls`.

    The device's own time, from CUDA events, where it takes longer than Python does.
    """
    if device.type != "cuda":
        return time_calls(call, repeats, seconds, device).done
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True)]
        synchronize(device)
        begin = time.perf_counter()
        marks[0].record()
        while len(marks) <= repeats and (len(marks) <= MIN_REPEATS or time.perf_counter() - begin < seconds):
            call()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            if len(marks) % 8 == 0:  # so that the clock on the host tells how much has been done
                marks[-4].synchronize()
        synchronize(device)
    return [1e-3 * start.elapsed_time(end) for start, end in pairwise(marks)]


def time_first(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, waited for."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def summarize(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


def measure_bandwidth(device: torch.device, mebibytes: int | None = None) -> float:
    """Bytes read and written per second, the median of 20: on a GPU of a copy of 1 GiB, on the CPU of a negation.

    The CPU negates 128 MiB in place: it would read a copy's target, too.
    """
    if mebibytes is None:
        mebibytes = 1024 if device.type == "cuda" else 128
    x = torch.ones(mebibytes * 2**18, device=device, dtype=torch.float32)
    y = torch.empty_like(x) if device.type == "cuda" else x
    call = (lambda: y.copy_(x)) if device.type == "cuda" else x.neg_
    call()
    return 2 * x.nbytes / statistics.median(time_queued(call, 20, 5.0, device))
