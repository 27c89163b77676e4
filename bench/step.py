"""Speed and memory of a whole optimizer step, of every rule, against AdamW and against the naive way."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lopt
from bench import naive
from bench.memory import measure_allocations
from bench.models import MODELS, Shapes
from lopt.rules import RULES

FOREACH, FUSED = "torch AdamW foreach", "torch AdamW fused"
MIN_REPEATS = 3
SEED = 0
HEADS = (
    "",
    "ns/\nparam",
    "p10 - p90",
    "re-\npeats",
    "/ AdamW\nforeach",
    "/ AdamW\nfused",
    "/ memory\nbound",
    "x faster\nthan naive",
    "state\nB/param",
    "transient\nB/param",
    "transient\nMiB",
    "ATen\ncalls",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Entry(NamedTuple):
    """Something to time.

    Attributes:
        start: makes a step out of named parameters that have gradients, with the tensors that it holds beside them:
            called after the first step, it returns first the state, then all else.
        state_bytes: of state per parameter, estimated; 0 for what is never skipped.
        rule: the rule that it is, or that it does naively.
    """

    name: str
    start: Callable[[dict[str, nn.Parameter]], tuple[Callable[[], object], Held]]
    state_bytes: float = 0.0
    rule: str = ""


Held = Callable[[], tuple[list[Tensor], list[Tensor]]]


def start_torch(params: dict[str, nn.Parameter], **options: bool) -> tuple[Callable[[], object], Held]:
    """`torch.optim.AdamW`."""
    optimizer = torch.optim.AdamW(params.values(), **options)
    return optimizer.step, lambda: ([x for state in optimizer.state.values() for x in state.values()], [])


def start_rule(params: dict[str, nn.Parameter], name: str) -> tuple[Callable[[], object], Held]:
    """`lopt.LearnedOptimizer` with a rule as constructed by default."""
    optimizer = lopt.LearnedOptimizer(params.items(), RULES[name](), num_steps=1000)
    step = partial(optimizer.step, loss=1.0) if optimizer.rule.needs_loss else optimizer.step

    def list_held() -> tuple[list[Tensor], list[Tensor]]:
        rules = [optimizer.rule, *optimizer._replicas.values()]
        weights = [x for rule in rules for x in (*rule.parameters(), *rule.buffers())]
        return [x for state in optimizer.state.values() for x in state.values()], weights

    return step, list_held


def start_naive(params: dict[str, nn.Parameter], name: str) -> tuple[Callable[[], object], Held]:
    """The rule of that name as `bench.naive` does it, with random weights."""
    update, widths = naive.UPDATES[name]
    device = next(iter(params.values())).device
    layers = [(weight.to(device), bias.to(device)) for weight, bias in naive.draw_layers(widths)]
    optimizer = naive.NaiveOptimizer(params.values(), update, layers)
    return optimizer.step, lambda: (
        [x for state in optimizer.state.values() for x in state.values()],
        [x for layer in layers for x in layer],
    )


def estimate_state_bytes(name: str) -> float:
    """Bytes of state per parameter, from a matrix of 256 x 256."""
    p = torch.zeros(256, 256)
    accumulators = RULES[name]().init_state({"p": p}).accumulators["p"]
    return sum(x.numel() * x.element_size() for x in accumulators.values()) / p.numel()


def list_entries(rules: tuple[str, ...], naives: tuple[str, ...]) -> Iterator[Entry]:
    """AdamW first, then the rules, each after its naive form."""
    yield Entry(FOREACH, partial(start_torch, foreach=True))
    yield Entry(FUSED, partial(start_torch, fused=True))
    for name in dict.fromkeys((*rules, *naives)):
        if name in naives:
            yield Entry(f"naive {name}", partial(start_naive, name=name), 16.0, name)
        if name in rules:
            yield Entry(name, partial(start_rule, name=name), estimate_state_bytes(name), name)


def draw(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients; the gradients' scale differs by tensor and by row."""
    generator = torch.Generator().manual_seed(SEED)
    randn = partial(torch.randn, generator=generator)
    params, grads = [], []
    for shape in shapes.values():
        params.append((0.02 * randn(shape)).to(device, dtype))
        rows = torch.exp(randn(shape[:1] + (1,) * (len(shape) - 1)))
        tensor = 10.0 ** (-4 * float(torch.rand((), generator=generator)))
        grads.append((tensor * rows * randn(shape)).to(device, dtype))
    return params, grads


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_repeats(call: Callable[[], object], repeats: int, seconds: float, device: torch.device) -> list[float]:
    """Seconds of each call: `repeats` of them, or as many as start within `seconds`, but at least `MIN_REPEATS`."""
    times: list[float] = []
    synchronize(device)
    begin = time.perf_counter()
    while len(times) < repeats and (len(times) < MIN_REPEATS or time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def summarize(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


def measure_bandwidth(device: torch.device, mebibytes: int = 128) -> float:
    """Bytes read and written per second when a tensor is negated in place: the median of 20."""
    x = torch.ones(mebibytes * 2**18, device=device)
    x.neg_()
    return 2 * x.nbytes / statistics.median(time_repeats(x.neg_, 20, 5.0, device))


def measure(
    entry: Entry, shapes: Shapes, drawn: tuple[list[Tensor], list[Tensor]], repeats: int, seconds: float
) -> dict[str, Any]:
    """One step makes the state, the second is looked at for its memory, the following ones are timed.

    Returns:
        `seconds` of each repeat, `ns_per_parameter` (median, p10, p90), `repeats`, `state_bytes_per_parameter`,
        `transient_bytes` (peak of what a step allocates beyond parameters, gradients, state and meta-weights) and
        `transient_bytes_per_parameter`, `aten_calls` of a step, `final_is_finite`.
    """
    params = {name: nn.Parameter(p.clone()) for name, p in zip(shapes, drawn[0], strict=True)}
    for p, g in zip(params.values(), drawn[1], strict=True):
        p.grad = g
    device = drawn[0][0].device
    step, list_held = entry.start(params)
    step()
    state, weights = list_held()
    held = [*params.values(), *drawn[1], *state, *weights]
    count = sum(p.numel() for p in params.values())
    transient, calls = measure_allocations(step, held, device)
    state_bytes = sum(x.numel() * x.element_size() for x in state)
    del state, weights, held  # the naive way makes its state anew at every step
    times = time_repeats(step, repeats, seconds, device)
    return {
        "name": entry.name,
        "rule": entry.rule,
        "repeats": len(times),
        "ns_per_parameter": {key: value / count * 1e9 for key, value in summarize(times).items()},
        "state_bytes_per_parameter": state_bytes / count,
        "transient_bytes": transient,
        "transient_bytes_per_parameter": transient / count,
        "aten_calls": calls,
        "final_is_finite": all(bool(p.isfinite().all()) for p in params.values()),
        "seconds": times,
    }


def add_ratios(results: list[dict[str, Any]], bandwidth: float, itemsize: int) -> None:
    """Compare medians with AdamW's, with the naive form's, and with the time that the memory traffic alone takes."""
    medians = {result["name"]: result["ns_per_parameter"]["median"] for result in results}
    for result in results:
        own = medians[result["name"]]
        floor = (3 * itemsize + 2 * result["state_bytes_per_parameter"]) / bandwidth * 1e9
        result["over_adamw_foreach"] = own / medians[FOREACH]
        result["over_adamw_fused"] = own / medians[FUSED]
        result["over_memory_bound"] = own / floor
        other = medians.get(f"naive {result['rule']}")
        if other is not None and result["name"] == result["rule"]:
            result["faster_than_naive"] = other / own


def read_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def describe_shapes(shapes: Shapes) -> str:
    """Each shape with how often it occurs, the larger ones first."""
    counts = Counter(shapes.values())
    largest_first = sorted(counts, key=prod, reverse=True)
    return ", ".join(f"{counts[shape]} of {'x'.join(map(str, shape)) or 'scalar'}" for shape in largest_first)


def write_figure(x: float) -> str:
    """Three digits, more before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def make_table(results: list[dict[str, Any]]) -> Table:
    """One row per entry."""
    table = Table(title="one optimizer step", title_justify="left", box=box.SIMPLE_HEAD)
    for head in HEADS:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for r in results:
        ns = r["ns_per_parameter"]
        table.add_row(
            r["name"],
            write_figure(ns["median"]),
            f"{write_figure(ns['p10'])} - {write_figure(ns['p90'])}",
            str(r["repeats"]),
            *(write_figure(r[f"over_{key}"]) for key in ("adamw_foreach", "adamw_fused", "memory_bound")),
            write_figure(r["faster_than_naive"]) if "faster_than_naive" in r else "",
            f"{r['state_bytes_per_parameter']:.2f}",
            f"{r['transient_bytes_per_parameter']:.3f}",
            f"{r['transient_bytes'] / 2**20:.2f}",
            str(r["aten_calls"]),
        )
    return table


@click.command()
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), help="Repeatable.  [default: all]")
@click.option(
    "--naive",
    "naives",
    multiple=True,
    type=click.Choice(list(naive.UPDATES)),
    help="Time this one the naive way; repeatable.  [default: those of the rules]",
)
@click.option("--no-naive", is_flag=True, help="Time nothing the naive way.")
@click.option("--model", default="mlp", show_default=True, type=click.Choice(list(MODELS)))
@click.option("--threads", default=torch.get_num_threads, type=click.IntRange(min=1), help="Threads of torch.")
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=MIN_REPEATS))
@click.option("--seconds", default=20.0, show_default=True, help=f"No repeat after these, but for {MIN_REPEATS}.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)), help="Of parameters.")
@click.option("--device", "where", default="cpu", show_default=True)
@click.option("--state-limit", type=float, help="GB of state to skip a rule at.  [default: 60 % of the memory]")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def step(
    rules: tuple[str, ...],
    naives: tuple[str, ...],
    no_naive: bool,
    model: str,
    threads: int,
    repeats: int,
    seconds: float,
    dtype: str,
    where: str,
    state_limit: float | None,
    file: Path | None,
) -> None:
    """Time and memory of a whole optimizer step: rules, AdamW, and rules done the naive way."""
    torch.set_num_threads(threads)
    device, shapes, kind = torch.device(where), MODELS[model], DTYPES[dtype]
    rules = rules or tuple(RULES)
    naives = () if no_naive else naives or tuple(name for name in rules if name in naive.UPDATES)
    count = sum(map(prod, shapes.values()))
    limit = 0.6 * read_memory(device) if state_limit is None else state_limit * 1e9
    drawn = draw(shapes, kind, device)
    bandwidth = measure_bandwidth(device)
    setting = {
        "model": f"{model}, {count / 1e6:.4g} M parameters in {len(shapes)} tensors: {describe_shapes(shapes)}",
        "dtype": dtype,
        "device": describe_device(device),
        "threads": threads,
        "memory bandwidth": f"{bandwidth / 1e9:.3g} GB/s",
        "lopt": lopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print("\n".join(f"{key} {value}" for key, value in setting.items()), highlight=False)
    results, skipped = [], []
    for entry in list_entries(rules, naives):
        if entry.state_bytes * count > limit:
            reason = (
                f"its state takes about {entry.state_bytes * count / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB"
            )
            console.print(f"{entry.name} skipped: {reason} (--state-limit)", highlight=False)
            skipped.append({"name": entry.name, "reason": reason})
            continue
        results.append(measure(entry, shapes, drawn, repeats, seconds))
        gc.collect()
        if not results[-1]["final_is_finite"]:
            console.print(f"{entry.name}: not all parameters are finite at the end", highlight=False)
    add_ratios(results, bandwidth, kind.itemsize)
    console.print(make_table(results))
    if file is not None:
        setting |= {"shapes": list(map(list, shapes.values())), "bytes_per_second": bandwidth, "seed": SEED}
        command = ["python", "-m", "bench", *sys.argv[1:]]
        content = {"command": command, "setting": setting, "results": results, "skipped": skipped}
        file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
