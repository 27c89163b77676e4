"""C++ files beside this one as libraries, compiled for the processor at hand when they are first asked for, and kept.

They need a compiler and nothing else, no headers of torch or Python: that takes a second or two for each, once per
machine. Libraries lie in `lopt_kernels.launching.tuning.find_cache()`, under a name that tells source, compiler and
processor.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from hashlib import sha256
from pathlib import Path

from lopt_kernels.launching.tuning import find_cache

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
NATIVE = ("-march=native", "-mprefer-vector-width=512")
"""For the processor at hand; without them, where a compiler does not know them."""

SWITCH = "LOPT_HOST_CODE"
TIMEOUT = 60.0  # seconds


@cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The library of a source file here, compiled if there is none yet; None where it cannot be, which warns once.

    Without a warning it is None where the environment has `LOPT_HOST_CODE=0`.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(_find_library(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in told.splitlines() if line.strip()), type(error).__name__)
        warnings.warn(
            f"torch's operations make the steps that {name}.cpp would make faster, as it cannot be compiled: {reason}. "
            f"Install a C++ compiler such as g++, or set {SWITCH}=0.",
            stacklevel=2,
        )
        return None


def _find_library(source: Path) -> Path:
    """The compiled file of a source, made now if it is not there.

    Raises:
        OSError: there is no compiler, or no folder to write to that is the user's alone.
        subprocess.SubprocessError: it fails, or takes longer than `TIMEOUT`.
    """
    wanted = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [wanted] if wanted else COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"there is no {wanted or ', '.join(COMPILERS)}")
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    known = (*texts, *FLAGS, *NATIVE, str(Path(compiler).resolve()), _describe_processor())
    folder = find_cache()
    library = folder / f"{source.stem}-{sha256(chr(0).join(known).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Other processes may compile the same: each has a file of its own until it is whole.
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{source.stem}.", suffix=".so")
        os.close(descriptor)
        try:
            _compile(compiler, source, temporary)
            os.replace(temporary, library)
        finally:
            Path(temporary).unlink(missing_ok=True)
    # What is loaded is run: nobody else may have put it there.
    state = library.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise PermissionError(f"{library} belongs to another user, or others may write to it: delete it")
    return library


def _compile(compiler: str, source: Path, target: str) -> None:
    def run(*flags: str) -> None:
        command = [compiler, *FLAGS, *flags, str(source), "-o", target]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)

    try:
        run(*NATIVE)
    except subprocess.CalledProcessError:
        run()


def _describe_processor() -> str:
    """What tells processors with other instructions apart: a home may be shared by many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(told)))
