"""What a measurement was made on and with, and how figures are written."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from lopt_kernels import OPS
from rich import box
from rich.console import Console
from rich.table import Table

import lopt
from bench.models import Shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTERPRETED = "interpreted: time means nothing"
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def describe_device(device: torch.device) -> str:
    """The GPU's name and memory, or the CPU's name and its number of cores."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {read_memory(device) / 2**30:.0f} GiB"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def read_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_shapes(shapes: Shapes) -> str:
    """Each shape with how often it occurs, the larger ones first."""
    counts = Counter(shapes.values())
    largest_first = sorted(counts, key=prod, reverse=True)
    return ", ".join(f"{counts[shape]} of {'x'.join(map(str, shape)) or 'scalar'}" for shape in largest_first)


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter; that is settled when they are imported."""
    try:
        import triton
    except ImportError:
        return False
    return not isinstance(OPS["adamw"].compile_source(torch.float32).kernel, triton.JITFunction)


def list_versions() -> dict[str, str]:
    """Of all that the figures depend on."""
    try:
        import triton

        compiler = triton.__version__ + (" (interpreted)" if is_interpreted() else "")
    except ImportError:
        compiler = "missing"
    versions = {"lopt": lopt.__version__, "torch": torch.__version__, "triton": compiler}
    return versions | {"cuda": str(torch.version.cuda), "python": platform.python_version()}


def list_command() -> list[str]:
    """The command that is running."""
    return ["python", "-m", "bench", *sys.argv[1:]]


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write what was measured, if there is a file to write to; a number that is not finite is an error."""
    if file is not None:
        text = json.dumps({"command": list_command()} | content, indent=2, allow_nan=False)
        file.write_text(text + "\n")


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Nothing compiled earlier is found, so that the first call tells what compiling takes."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: f"{folder}/{name.lower()}" for name in CACHES})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def make_console() -> Console:
    """As wide as the terminal; without one no line is wrapped and no cell cut, however long its figures are."""
    return Console(width=None if sys.stdout.isatty() else 10_000)


def print_setting(console: Console, setting: dict[str, Any]) -> None:
    """One line per entry."""
    console.print("\n".join(f"{key} {value}" for key, value in setting.items()), highlight=False, markup=False)


def start_table(title: str, heads: list[str] | tuple[str, ...], texts: int = 1) -> Table:
    """A table without rows; its first `texts` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < texts else "right", no_wrap=True)
    return table


def write_figure(x: float | None) -> str:
    """Three digits, more before the point; nothing for None."""
    if x is None:
        return ""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def write_error(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()
