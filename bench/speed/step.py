"""Speed and memory of a whole optimizer step, of every rule, against AdamW and against the naive way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor, nn

from bench import naive, setting
from bench.entries import FOREACH, FUSED, PRECISIONS, SEED, Entry, Params, draw, list_entries
from bench.gpu import cuda
from bench.memory import measure_allocations
from bench.models import MODELS, Shapes
from bench.setting import DTYPES, INTERPRETED, write_figure
from bench.timing import MIN_REPEATS, measure_bandwidth, summarize, time_calls, time_first, time_queued
from lopt.rules import RULES

Drawn = tuple[list[Tensor], list[Tensor]]
Result = dict[str, Any]


def make_params(shapes: Shapes, drawn: Drawn) -> Params:
    """Copies of the drawn parameters, with the drawn gradients."""
    params = {name: nn.Parameter(p.clone()) for name, p in zip(shapes, drawn[0], strict=True)}
    for p, g in zip(params.values(), drawn[1], strict=True):
        p.grad = g
    return params


def measure(entry: Entry, shapes: Shapes, drawn: Drawn, repeats: int, seconds: float, graph: bool = False) -> Result:
    """One step makes the state, the second is looked at for its memory, the following ones are timed.

    Returns:
        `seconds` of each repeat, each waited for, `repeats`, and of them `ns_per_parameter` (median, p10, p90);
        `host_seconds` (likewise; until `step` returns); `cpu_seconds` (mean, with steps that do more than others);
        `first_seconds` (of the first step, with all compilation); `state_bytes_per_parameter`; `transient_bytes` (peak
        of what a step allocates beyond parameters, gradients, state and meta-weights) and
        `transient_bytes_per_parameter`; `aten_calls` of a step; `final_is_finite`; `backend` and `backend_reason`. On a
        GPU `queued_seconds` (median, p10, p90; steps that the device has waiting), `launches` (kernels of a step) and
        `copies` (beside them). With `graph`, `graph_seconds` of its replay or `graph_error`.
    """
    params = make_params(shapes, drawn)
    device = drawn[0][0].device
    step, list_held, backend = entry.start(params)
    first = time_first(step, device)
    state, weights = list_held()
    held = [*params.values(), *drawn[1], *state, *weights]
    count = sum(p.numel() for p in params.values())
    transient, calls = measure_allocations(step, held, device)
    state_bytes = sum(x.numel() * x.element_size() for x in state)
    del state, weights, held  # the naive way makes its state anew at every step
    times = time_calls(step, repeats, seconds, device)
    result = {
        "name": entry.name,
        "rule": entry.rule,
        "repeats": len(times.done),
        "ns_per_parameter": {key: value / count * 1e9 for key, value in summarize(times.done).items()},
        "host_seconds": summarize(times.returned),
        "cpu_seconds": sum(times.cpu) / len(times.cpu),
        "first_seconds": first,
        "state_bytes_per_parameter": state_bytes / count,
        "transient_bytes": transient,
        "transient_bytes_per_parameter": transient / count,
        "aten_calls": calls,
        "final_is_finite": all(bool(p.isfinite().all()) for p in params.values()),
        "seconds": times.done,
    }
    if backend is not None:
        result |= {"backend": backend[0], "backend_reason": backend[1]}
    if device.type == "cuda":
        result["queued_seconds"] = summarize(time_queued(step, repeats, seconds, device))
        launches = cuda.record_launches(step, device)
        result["launches"] = cuda.count_kernels(launches)
        result["copies"] = len(launches) - result["launches"]
    if graph:
        del params, step, list_held  # room for another one
        gc.collect()
        result |= measure_graph(entry, shapes, drawn, repeats, seconds)
    return result


def measure_graph(entry: Entry, shapes: Shapes, drawn: Drawn, repeats: int, seconds: float) -> Result:
    """`graph_seconds` (median, p10, p90) of the replay of a captured step, or `graph_error`."""
    started = entry.start(make_params(shapes, drawn), capturable=drawn[0][0].device.type == "cuda")
    try:
        return {"graph_seconds": summarize(cuda.time_graph(started.step, repeats, seconds, drawn[0][0].device))}
    except Exception as error:  # whatever stands in the way of a capture is the result
        cause = error.__context__  # the capture's own end fails, too
        return {"graph_error": setting.write_error(cause if isinstance(cause, Exception) else error)}


def measure_all(
    entries: Iterable[Entry],
    shapes: Shapes,
    drawn: Drawn,
    limit: float,
    report: Callable[[str], None],
    **options: Any,
) -> tuple[list[Result], list[dict[str, str]]]:
    """Measure one entry after the other; one that fails, or whose state is too large, is told and left out.

    Args:
        limit: bytes of state.
        report: is told what is left out, and why.
        options: of `measure`.
    Returns:
        The results, and name, reason and kind ("limit" or "error") of what was left out.
    """
    results: list[Result] = []
    skipped: list[dict[str, str]] = []
    count = sum(map(prod, shapes.values()))
    for entry in entries:
        size = entry.state_bytes * count
        reason, kind = "", "limit"
        if size > limit:
            reason = f"its state takes about {size / 1e9:.1f} GB, the limit is {limit / 1e9:.1f} GB (--state-limit)"
        else:
            try:
                results.append(measure(entry, shapes, drawn, **options))
            except Exception as error:  # the others are measured all the same
                reason, kind = setting.write_error(error), "error"
        if reason:
            report(f"{entry.name} {'skipped' if kind == 'limit' else 'failed'}: {reason}")
            skipped.append({"name": entry.name, "kind": kind, "reason": reason})
        elif not results[-1]["final_is_finite"]:
            report(f"{entry.name}: not all parameters are finite at the end")
        gc.collect()
        if drawn[0][0].device.type == "cuda":
            torch.cuda.empty_cache()
    return results, skipped


def add_ratios(results: list[Result], bandwidth: float, itemsize: int, count: int) -> None:
    """Compare medians with AdamW's, with the naive form's, and with the time that the memory traffic alone takes.

    On a GPU those of steps that wait for each other. Interpreted kernels are compared with nothing.
    """
    meant = [result for result in results if not is_interpreted(result)]
    medians = {result["name"]: take_seconds(result, count) for result in meant}
    for result in meant:
        own = medians[result["name"]]
        floor = count * (3 * itemsize + 2 * result["state_bytes_per_parameter"]) / bandwidth
        for key, name in (("over_adamw_foreach", FOREACH), ("over_adamw_fused", FUSED)):
            if name in medians:
                result[key] = own / medians[name]
        result["over_memory_bound"] = own / floor
        other = medians.get(f"naive {result['rule']}")
        if other is not None and result["name"] == result["rule"]:
            result["faster_than_naive"] = other / own


def is_interpreted(result: Result) -> bool:
    """Its kernels ran in Triton's interpreter: their time means nothing."""
    return result.get("backend") == "triton" and setting.is_interpreted()


def take_seconds(result: Result, count: int) -> float:
    """The median that ratios are made of: of queued steps where there are any."""
    if "queued_seconds" in result:
        return float(result["queued_seconds"]["median"])
    return float(result["ns_per_parameter"]["median"]) * count * 1e-9


def list_columns(count: int) -> list[tuple[str, Callable[[Result], str]]]:
    """Heads and contents; a column without any content is left out."""

    def write(key: str, factor: float = 1.0) -> Callable[[Result], str]:
        def get(r: Result) -> str:
            value = r.get(key)
            value = value["median"] if isinstance(value, dict) else value
            return write_figure(None if value is None else factor * value)

        return get

    def write_spread(r: Result) -> str:
        return " - ".join(write_figure(r["ns_per_parameter"][key]) for key in ("p10", "p90"))

    return [
        ("", lambda r: r["name"]),
        ("ns/\nparam", write("ns_per_parameter")),
        ("p10 - p90", write_spread),
        ("re-\npeats", lambda r: str(r["repeats"])),
        ("queued\nms", write("queued_seconds", 1e3)),
        ("graph\nms", write("graph_seconds", 1e3)),
        ("host\nms", lambda r: write("host_seconds", 1e3)(r) if "queued_seconds" in r else ""),
        ("/ AdamW\nforeach", write("over_adamw_foreach")),
        ("/ AdamW\nfused", write("over_adamw_fused")),
        ("/ memory\nbound", write("over_memory_bound")),
        ("CPU\nms", lambda r: write("cpu_seconds", 1e3)(r) if "queued_seconds" not in r else ""),
        ("x faster\nthan naive", write("faster_than_naive")),
        ("state\nB/param", lambda r: f"{r['state_bytes_per_parameter']:.2f}"),
        ("transient\nB/param", lambda r: f"{r['transient_bytes_per_parameter']:.3f}"),
        ("transient\nMiB", lambda r: f"{r['transient_bytes'] / 2**20:.2f}"),
        ("ATen\ncalls", lambda r: str(r["aten_calls"])),
        ("laun-\nches", lambda r: str(r.get("launches", ""))),
        ("first\nstep, s", write("first_seconds")),
        ("back-\nend", lambda r: r.get("backend", "")),
    ]


def make_table(results: list[Result], count: int) -> Table:
    """One row per entry."""
    columns = [(head, get) for head, get in list_columns(count) if any(map(get, results))]
    table = setting.start_table("one optimizer step", [head for head, _ in columns])
    for result in results:
        table.add_row(*(get(result) for _, get in columns))
    return table


def tell_graphs(results: list[Result], report: Callable[[str], None]) -> None:
    """Say which steps could not be captured, and why."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        if "graph_error" in result:
            reasons.setdefault(result["graph_error"], []).append(result["name"])
    for reason, names in reasons.items():
        report(f"no CUDA graph of {', '.join(names)}: {reason}")


def describe_model(name: str) -> str:
    """Its name, number of parameters and shapes."""
    shapes = MODELS[name]
    count = sum(map(prod, shapes.values()))
    return f"{name}, {count / 1e6:.4g} M parameters in {len(shapes)} tensors: {setting.describe_shapes(shapes)}"


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
@click.option("--state-dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the rules' state, if given.")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "torch", "triton"]))
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Of the rules' matrix products, if given.")
@click.option("--graph", is_flag=True, help="Time the replay of a CUDA graph of the step, too.")
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
    state_dtype: str | None,
    backend: str,
    precision: str | None,
    graph: bool,
    where: str,
    state_limit: float | None,
    file: Path | None,
) -> None:
    """Time and memory of a whole optimizer step: rules, AdamW, and rules done the naive way."""
    torch.set_num_threads(threads)
    device, shapes, kind = torch.device(where), MODELS[model], DTYPES[dtype]
    if graph and device.type != "cuda":
        raise click.UsageError(f"--graph needs a CUDA device, not {device}: add --device cuda.")
    rules = rules or tuple(RULES)
    naives = () if no_naive else naives or tuple(name for name in rules if name in naive.UPDATES)
    count = sum(map(prod, shapes.values()))
    limit = 0.6 * setting.read_memory(device) if state_limit is None else state_limit * 1e9
    options: dict[str, Any] = {"backend": backend, "precision": precision}
    if state_dtype is not None:
        options["state_dtype"] = DTYPES[state_dtype]
    drawn = draw(shapes, kind, device)
    bandwidth = measure_bandwidth(device)
    told = {
        "model": describe_model(model),
        "dtype": dtype,
        "state dtype": state_dtype or "the rules' own",
        "backend": backend,
        "precision": precision or torch.get_float32_matmul_precision(),
        "device": setting.describe_device(device),
        "threads": threads,
        "memory bandwidth": f"{bandwidth / 1e9:.3g} GB/s",
    } | setting.list_versions()
    console = setting.make_console()
    setting.print_setting(console, told)

    def report(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    entries = list_entries(rules, naives, **options)
    results, skipped = measure_all(entries, shapes, drawn, limit, report, repeats=repeats, seconds=seconds, graph=graph)
    add_ratios(results, bandwidth, kind.itemsize, count)
    console.print(make_table(results, count))
    tell_graphs(results, report)
    if any(map(is_interpreted, results)):
        report(f"backend triton is {INTERPRETED}")
    told |= {"shapes": list(map(list, shapes.values())), "bytes_per_second": bandwidth, "seed": SEED}
    setting.write_json(file, {"setting": told, "results": results, "skipped": skipped})
    failed = [entry["name"] for entry in skipped if entry["kind"] == "error"]
    if failed:
        raise click.ClickException(f"not measured: {', '.join(failed)}, see above.")
