"""What a kernel takes of a GPU, known from its compilation alone: registers, spills, shared memory.

`python -m bench compile` prints these figures, and tests look for spills in them, on machines without a GPU.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from lopt_kernels.launching.op import CompileSource

SUFFIX = {90: "a"}  # of the architecture's name where Triton uses features of this generation only


class Figures(NamedTuple):
    """Of one kernel for one capability.

    Attributes:
        registers: per thread.
        spilled: bytes per thread that are stored and loaded again because registers run out.
        shared: bytes of shared memory per program.
        warps: per program.
    """

    registers: int
    spilled: int
    shared: int
    warps: int


def compile_figures(source: CompileSource, capability: int) -> Figures:
    """Compile a kernel for an NVIDIA GPU, of which none is needed, and ask Triton's ptxas what it takes.

    Args:
        capability: 80 for sm_80, ...
    Raises:
        RuntimeError: ptxas does not take the code, or Triton is interpreted.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    if not isinstance(source.kernel, triton.JITFunction):
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET before triton is imported.")
    made = ASTSource(source.kernel, source.signature, source.constexprs)
    kernel = triton.compile(made, target=GPUTarget("cuda", capability, 32), options=source.options)
    with tempfile.TemporaryDirectory() as folder:
        code, target = Path(folder, "kernel.ptx"), f"sm_{capability}{SUFFIX.get(capability, '')}"
        code.write_text(kernel.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", str(code), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", told)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas told no figures for {target}: {told.strip()}")
    return Figures(
        int(registers[1]), max(map(int, spilled.groups())), kernel.metadata.shared, kernel.metadata.num_warps
    )
