"""Every kernel against its definition, plain and compiled by torch, and against the speed of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from lopt_kernels.feature_mlp import samples
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import setting
from bench.gpu import cuda, replay
from bench.gpu.roofline import draw_roofline
from bench.memory import measure_allocations
from bench.setting import INTERPRETED, write_figure
from bench.timing import MIN_REPEATS, measure_bandwidth, summarize, time_first, time_queued
from bench.variants import Variant, list_ops, list_variants, pick

WAYS = ("reference", "compiled", "triton")
LARGEST, BYTES = 2**26, 2**30  # a default count on a GPU: at most so many coordinates, whose call moves so much
CPU_COUNT, INTERPRETED_COUNT = 2**18, 2**10
SEED = 0
SLOTS = 16  # of an op with a backward pass
HEADS = (
    *("kernel", "dtype", "count", "B/\nparam", "way", "us", "p10 - p90", "GB/s", "% of\ncopy", "x ref-\nerence"),
    *("x com-\npiled", "laun-\nches", "transient\nB/param", "first\nuse, s"),
)


class Case(NamedTuple):
    """One kernel with what it works on.

    Attributes:
        reference: the op's definition, to be called with `arguments`.
        finish: what is done with its result; None: nothing.
        launch: the kernel, with the copies and checks around it.
        held: all tensors that there are before.
    """

    variant: Variant
    count: int
    reference: Callable[..., Any]
    arguments: dict[str, Any]
    finish: Callable[[Any], Any] | None
    launch: Callable[[], Any]
    held: list[Tensor]


def round_count(count: int) -> int:
    """Down to a power of two."""
    return 1 << (count.bit_length() - 1)


def choose_count(variant: Variant, device: torch.device) -> int:
    """Large enough for the device's memory to matter; small enough for a CPU."""
    if device.type == "cuda":
        return round_count(min(LARGEST, max(1, int(BYTES / variant.count_bytes_per_parameter()))))
    return INTERPRETED_COUNT if setting.is_interpreted() else CPU_COUNT


def make_case(variant: Variant, count: int, device: torch.device) -> Case:
    """Inputs as the op's sampler draws them, but matrices are about square."""
    generator, op = torch.Generator(device).manual_seed(SEED), variant.op
    if variant.has_gradient:
        return make_gradient_case(variant, count, generator, device)
    width = 2 ** (count.bit_length() // 2)
    options = variant.make_options()
    with patch.object(samples, "divide_coordinates", lambda count: [(count // width, width), (count % width,)]):
        inputs = op.sample(count, generator, variant.dtype, device, **pick(op.sample, options))
    launched = inputs | pick(op.launch, options)
    held = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    arguments = take_first(variant.key, inputs) if "group" in inputs else inputs
    return Case(variant, count, op.reference, arguments, None, lambda: op.launch(**launched), held)


def make_gradient_case(variant: Variant, count: int, generator: torch.Generator, device: torch.device) -> Case:
    """Forward and backward pass, with gradients of all inputs; the coordinates are those of several slots together."""
    op, slots = variant.op, min(SLOTS, count)
    inputs = op.sample(slots, count // slots, generator, variant.dtype, device)
    wanted = [x.requires_grad_() for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]

    def differentiate(result: Any) -> Any:
        out = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        return torch.autograd.grad(out, wanted, [torch.ones_like(x) for x in out], allow_unused=True)

    def call(arguments: Any) -> Any:
        return op.reference(*arguments)

    return Case(
        variant, count, call, {"arguments": inputs}, differentiate, lambda: differentiate(op.run(*inputs)), wanted
    )


def take_first(key: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """A reference's arguments: those of the first tensor of the group, which has all elements."""
    t = inputs["group"][0]
    if key == "mlp":
        first, bias, rest, gain = inputs["weights"]
        inputs = inputs | {"weights": type(inputs["weights"])(first[:1], bias[:1], rest[:1], gain[:1])}
    if key == "fold":
        first = {"sums": inputs["sums"][0], "weights": inputs["weights"][0]}
        inputs = inputs | first | {"step": inputs["steps"][:1].float(), "factor": inputs["factor"][:1]}
    return {key: value for key, value in inputs.items() if key not in ("group", "steps")} | {"t": t}


def measure_call(
    case: Case, call: Callable[[], Any], first: float, bandwidth: float, repeats: int, seconds: float
) -> dict[str, Any]:
    """Seconds (median, p10, p90) of a call, what they are in bytes per second, and its first use.

    The bytes are those that the formula has to move, whatever the call moves.
    """
    device = case.held[0].device
    times = time_queued(call, repeats, seconds, device)
    told = summarize(times)
    rate = case.variant.count_bytes(case.count) / told["median"]
    result = {"seconds": told, "repeats": len(times), "first_use_seconds": first - told["median"]}
    if device.type == "cuda":
        result["launches"] = cuda.count_kernels(cuda.record_launches(call, device))
    return result | {"gb_per_second": rate / 1e9, "of_copy": rate / bandwidth}


def measure_reference(case: Case, compiled: bool, bandwidth: float, repeats: int, seconds: float) -> dict[str, Any]:
    """The definition, in plain PyTorch or compiled; transient bytes are those of its results, too."""
    device, reference = case.held[0].device, case.reference
    if compiled:
        torch._dynamo.reset()
        reference = torch.compile(reference, dynamic=False)

    def call() -> Any:
        with torch.set_grad_enabled(case.finish is not None):
            result = reference(**case.arguments)
            return result if case.finish is None else case.finish(result)

    first = time_first(call, device)
    result = measure_call(case, call, first, bandwidth, repeats, seconds)
    result["transient_bytes"] = measure_allocations(call, case.held, device)[0]
    return result


def measure_triton(case: Case, bandwidth: float, repeats: int, seconds: float) -> dict[str, Any]:
    """The kernels of the launch, launched again; transient bytes are what they are given beside inputs and results.

    Of an op with a backward pass, the whole call.
    """
    device = case.held[0].device
    if device.type != "cuda" and not setting.is_interpreted():
        raise RuntimeError("Triton needs a GPU (--device cuda), or TRITON_INTERPRET=1 from the start")
    recorded: list[replay.Recording] = []
    with torch.set_grad_enabled(case.finish is not None):
        first = time_first(lambda: recorded.append(replay.record(case.launch)), device)
        again = recorded[0] if case.finish is None else case.launch
        result = measure_call(case, again, first, bandwidth, repeats, seconds)
    result.setdefault("launches", len(recorded[0].kernels))
    if case.finish is None:
        result["transient_bytes"] = recorded[0].count_buffers(case.held)
    else:
        recorded.clear()
        result["transient_bytes"] = measure_allocations(case.launch, case.held, device)[0]
    if setting.is_interpreted():
        result |= {"note": INTERPRETED, "gb_per_second": None, "of_copy": None, "first_use_seconds": None}
    return result


def measure(
    variant: Variant, count: int, device: torch.device, bandwidth: float, ways: Iterable[str], **options: Any
) -> dict[str, Any]:
    """All ways of one kernel; a way that fails has an `error` in place of its figures."""
    found: dict[str, Any] = {}
    result = variant.describe() | {
        "count": count,
        "bytes": variant.count_bytes(count),
        "bytes_per_parameter": variant.count_bytes(count) / count,
        "ways": found,
    }
    case = make_case(variant, count, device)
    for way in ways:
        try:
            if way == "triton":
                found[way] = measure_triton(case, bandwidth, **options)
            else:
                found[way] = measure_reference(case, way == "compiled", bandwidth, **options)
        except Exception as error:  # the other ways are measured all the same
            found[way] = {"error": setting.write_error(error)}
        gc.collect()
    fused = found.get("triton", {})
    for way in ("reference", "compiled"):
        if "seconds" in fused and "note" not in fused and "seconds" in found.get(way, {}):
            fused[f"faster_than_{way}"] = found[way]["seconds"]["median"] / fused["seconds"]["median"]
    return result


def measure_all(
    variants: Iterable[Variant],
    count: int | None,
    device: torch.device,
    bandwidth: float,
    ways: tuple[str, ...],
    tell: Callable[[dict[str, Any]], None] = lambda result: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """`measure` of each; variants whose definition is the same share its figures."""
    results: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    for variant in variants:
        same = repr((variant.key, variant.dtype, {k: v for k, v in variant.options.items() if k != "precision"}))
        missing = tuple(way for way in ways if way == "triton" or way not in known.get(same, {}))
        number = round_count(count) if count else choose_count(variant, device)
        try:
            result = measure(variant, number, device, bandwidth, missing, **options)
        except Exception as error:  # the others are measured all the same
            result = variant.describe() | {"count": number, "ways": {}, "error": setting.write_error(error)}
        known.setdefault(same, {way: result["ways"][way] for way in missing if way in result["ways"]}).pop("triton", 0)
        results.append(result)
        tell(result)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def warm_compiler(device: torch.device) -> None:
    """Let torch.compile set itself up: that is not what compiling a kernel takes."""
    torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(3, device=device, dtype=torch.float32))


def make_table(results: list[dict[str, Any]]) -> Table:
    """One row per kernel and way."""
    table = setting.start_table("kernels", HEADS, texts=2)
    for result in results:
        for way, r in result["ways"].items():
            if "error" in r:
                continue
            us = {key: write_figure(1e6 * value) for key, value in r["seconds"].items()}
            copied = None if r["of_copy"] is None else 100 * r["of_copy"]
            table.add_row(
                *(result["kernel"], result["state_dtype"], str(result["count"])),
                *(f"{result['bytes_per_parameter']:.3g}", way + (" *" if "note" in r else "")),
                *(us["median"], f"{us['p10']} - {us['p90']}", write_rate(r["gb_per_second"]), write_rate(copied)),
                *(write_figure(r.get(f"faster_than_{other}")) for other in ("reference", "compiled")),
                *(str(r.get("launches", "")), write_figure(r["transient_bytes"] / result["count"])),
                write_rate(r["first_use_seconds"]),
            )
    return table


def write_rate(x: float | None) -> str:
    """Two digits behind the point at most; nothing for None."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}"


def list_notes(results: list[dict[str, Any]]) -> list[str]:
    """What the table cannot say: why something is missing, and what is not to be believed."""
    notes = [f"{r['kernel']} {r['state_dtype']}: {r['error']}" for r in results if "error" in r]
    for r in results:
        errors = {way: found["error"] for way, found in r["ways"].items() if "error" in found}
        notes += [f"{r['kernel']} {r['state_dtype']}, {way}: {error}" for way, error in errors.items()]
    if any("note" in found for r in results for found in r["ways"].values()):
        notes.append(f"* {INTERPRETED}")
    return notes


@click.command()
@click.option("--op", "ops", multiple=True, type=click.Choice(list(list_ops())), help="Repeatable.  [default: all]")
@click.option("--count", type=click.IntRange(min=64), help="Coordinates, rounded down to a power of two.")
@click.option("--device", "where", help="[default: cuda if there is one]")
@click.option("--threads", default=torch.get_num_threads, type=click.IntRange(min=1), help="Threads of torch.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=MIN_REPEATS))
@click.option("--seconds", default=5.0, show_default=True, help=f"No repeat after these, but for {MIN_REPEATS}.")
@click.option("--compile/--no-compile", "compiles", default=True, show_default=True, help="Time torch.compile, too.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw a roofline here, as PNG.")
def kernels(
    ops: tuple[str, ...],
    count: int | None,
    where: str | None,
    threads: int,
    repeats: int,
    seconds: float,
    compiles: bool,
    file: Path | None,
    picture: Path | None,
) -> None:
    """Every kernel against its definition, eager and compiled, and against the speed of memory."""
    torch.set_num_threads(threads)
    device = torch.device(where or ("cuda" if torch.cuda.is_available() else "cpu"))
    ways = WAYS if compiles else ("reference", "triton")
    bandwidth = measure_bandwidth(device)
    told = {"device": setting.describe_device(device), "threads": threads}
    told |= {"memory bandwidth": f"{bandwidth / 1e9:.3g} GB/s"} | setting.list_versions()
    console = setting.make_console()
    setting.print_setting(console, told)
    with setting.fresh_caches():
        if compiles:
            warm_compiler(device)
        results = measure_all(list_variants(ops), count, device, bandwidth, ways, repeats=repeats, seconds=seconds)
    console.print(make_table(results))
    for line in list_notes(results):
        console.print(line, highlight=False, markup=False)
    setting.write_json(file, {"setting": told | {"bytes_per_second": bandwidth, "seed": SEED}, "results": results})
    if picture is not None:
        picture.write_bytes(draw_roofline(results, bandwidth, told["device"]))
