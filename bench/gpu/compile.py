"""What every kernel takes of a GPU, told by its compilation: no GPU is needed."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from lopt_kernels.launching.figures import compile_figures
from lopt_kernels.launching.op import CompileSource
from rich.table import Table

from bench import setting
from bench.variants import Variant, list_ops, list_variants

HEADS = ("kernel", "state", "target", "B/param", "registers", "spilled B", "shared B", "warps", "seconds")
HIP_HEADS = (
    *("kernel", "state", "target", "compiles", "VGPRs", "spilled\nVGPRs", "SGPRs", "spilled\nSGPRs", "scratch B"),
    *("shared B", "waves", "seconds"),
)
HIP_FIGURES = {
    "registers": r"\.vgpr_count: +(\d+)",
    "spilled_registers": r"\.vgpr_spill_count: +(\d+)",
    "scalar_registers": r"\.sgpr_count: +(\d+)",
    "spilled_scalar_registers": r"\.sgpr_spill_count: +(\d+)",
    "scratch": r"; ScratchSize: (\d+)",
}


def compile_once(source: CompileSource, backend: str, arch: int | str, lanes: int) -> tuple[Any, float]:
    """Triton's compiled kernel, and how many seconds that took."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    made = ASTSource(source.kernel, source.signature, source.constexprs)
    kernel = triton.compile(made, target=GPUTarget(backend, arch, lanes), options=source.options)
    return kernel, time.perf_counter() - start


def measure_cuda(variant: Variant, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, warps and seconds, or the error of the compiler.

    The seconds are Triton's, with its own call of ptxas; the second call, which tells the figures, is not counted.
    """
    row = variant.describe() | {
        "target": f"sm_{capability}",
        "bytes_per_parameter": variant.count_bytes_per_parameter(),
    }
    try:
        source = variant.make_source()
        _, seconds = compile_once(source, "cuda", capability, 32)
        return row | compile_figures(source, capability)._asdict() | {"seconds": seconds}
    except Exception as error:  # one kernel that does not compile must not hide the others
        return row | {"error": setting.write_error(error)}


def measure_hip(variant: Variant, arch: str) -> dict[str, Any]:
    """What the metadata and the assembly of an AMD GPU's kernel tell, or the error of the compiler."""
    row = variant.describe() | {"target": arch, "bytes_per_parameter": variant.count_bytes_per_parameter()}
    try:
        lanes = 64 if arch.startswith("gfx9") else 32
        source = variant.make_source()
        sizes = source.constexprs.get("SIZES")
        exact = {"SIZES": sizes._replace(FAST=False)} if hasattr(sizes, "FAST") else {}  # NVIDIA's instructions
        source = replace(source, constexprs=source.constexprs | exact)
        kernel, seconds = compile_once(source, "hip", arch, lanes)
        row |= read_hip_figures(kernel.asm["amdgcn"])
        return row | {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps, "seconds": seconds}
    except Exception as error:  # likewise
        return row | {"error": setting.write_error(error)}


def read_hip_figures(assembly: str) -> dict[str, int]:
    """Vector and scalar registers of a thread or wave, how many of them are spilled, and bytes of scratch memory.

    Raises:
        ValueError: the assembly does not tell one of them.
    """
    figures = {}
    for name, pattern in HIP_FIGURES.items():
        found = re.search(pattern, assembly)
        if found is None:
            raise ValueError(f"the assembly does not tell {name!r} (looked for {pattern!r})")
        figures[name] = int(found[1])
    return figures


def make_table(rows: list[dict[str, Any]]) -> Table:
    """One row per kernel and target that compiles."""
    table = setting.start_table("compiled for NVIDIA GPUs, per thread or per program", HEADS, texts=3)
    for row in rows:
        if "error" not in row:
            figures = [str(row[key]) for key in ("registers", "spilled", "shared", "warps")]
            table.add_row(*name_row(row), write_bytes(row), *figures, f"{row['seconds']:.1f}")
    return table


def make_hip_table(rows: list[dict[str, Any]]) -> Table:
    """One row per kernel: whether it compiles, and what its metadata tell."""
    table = setting.start_table("compiled for AMD GPUs", HIP_HEADS, texts=4)
    for row in rows:
        last = ["no"]
        if "error" not in row:
            figures = [str(row[key]) for key in (*HIP_FIGURES, "shared", "warps")]
            last = ["yes", *figures, f"{row['seconds']:.1f}"]
        table.add_row(*name_row(row), *last)
    return table


def list_errors(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel that does not compile: which, for what and why."""
    return [f"{' '.join(name_row(row))}: {row['error']}" for row in rows if "error" in row]


def name_row(row: dict[str, Any]) -> tuple[str, str, str]:
    """Kernel, dtype and target."""
    return row["kernel"], row["state_dtype"], row["target"]


def write_bytes(row: dict[str, Any]) -> str:
    """Bytes per parameter."""
    return f"{row['bytes_per_parameter']:.4g}"


@click.command("compile")
@click.option("--op", "ops", multiple=True, type=click.Choice(list(list_ops())), help="Repeatable.  [default: all]")
@click.option("--capability", "capabilities", multiple=True, type=int, help="Repeatable.  [default: 80 and 90]")
@click.option("--hip", "architectures", multiple=True, help="AMD architecture such as gfx942; repeatable.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def compile_kernels(
    ops: tuple[str, ...], capabilities: tuple[int, ...], architectures: tuple[str, ...], file: Path | None
) -> None:
    """Registers, spills, shared memory and compile time of every kernel; no GPU is needed."""
    if setting.is_interpreted():
        raise click.ClickException("kernels are interpreted: unset TRITON_INTERPRET and run this again.")
    if setting.list_versions()["triton"] == "missing":
        raise click.ClickException("Triton is not installed: pip install triton.")
    variants, console = list_variants(ops, parts=True), setting.make_console()
    versions = setting.list_versions()
    setting.print_setting(console, versions)
    rows: list[dict[str, Any]] = []
    hip: list[dict[str, Any]] = []
    with setting.fresh_caches():
        for variant in variants:
            rows += [measure_cuda(variant, capability) for capability in capabilities or (80, 90)]
            hip += [measure_hip(variant, architecture) for architecture in architectures]
    console.print(make_table(rows))
    if hip:
        console.print(make_hip_table(hip))
    for line in list_errors(rows + hip):
        console.print(line, highlight=False, markup=False)
    setting.write_json(file, {"setting": versions, "cuda": rows, "hip": hip})
    failed = [row for row in rows if "error" in row]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(rows)} compilations failed, see above.")
