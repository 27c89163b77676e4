"""All that is to be known of a GPU, by one command in five minutes: targets, what is left of a step, every kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_map

from bench import setting
from bench.entries import SEED, Entry, draw, list_torch_entries, make_rule_entry
from bench.gpu import cuda, kernels
from bench.models import MODELS
from bench.setting import write_figure
from bench.speed.step import Result, add_ratios, describe_model, make_params, make_table, measure_all, tell_graphs
from bench.timing import MIN_REPEATS, measure_bandwidth
from bench.variants import list_ops, list_variants

PARTS = ("targets", "profile", "kernels")
RULES = ("small_fc", "celo2_base", "celo2", "celo", "velo", "mlp", "lstm", "rnnprop", "adamw")
RECURRENT = ("lstm", "rnnprop")  # rules that are timed with a bfloat16 state, too
BFLOAT16 = "bfloat16 state"
ON_TENSOR_CORES = ("small_fc", "mlp")  # rules whose MLP is wide enough; timed with less precise products, too
PROFILED = "small_fc"
CPU_COUNT = 64  # coordinates of a kernel without a GPU: a dry run
PARAMETER_BYTES = 4
Item = TypeVar("Item")


class Target(NamedTuple):
    """What a figure must not exceed, and what it had better not exceed."""

    figure: str
    text: str
    must: float
    aim: float | None = None


# For float32 parameters and state on ViT-B/16; the other models are there to compare.
OF_SMALL_FC = [Target("over_adamw_fused", "x fused AdamW", 4.0, 3.0)]
TARGETS = {
    "small_fc": OF_SMALL_FC,
    "small_fc tf32": OF_SMALL_FC,
    "small_fc bf16": OF_SMALL_FC,
    "celo2_base": [Target("over_adamw_fused", "x fused AdamW", 3.0, 2.3)],
    f"lstm {BFLOAT16}": [Target("over_memory_bound", "x memory bound", 1.5, 1.2)],
}
OF_ALL_RULES = [
    Target("launches", "launches", 12, 6),
    Target("transient_bytes_per_parameter", "transient B/param", 0.2),
]


class NoDeviceError(click.ClickException):
    """There is no GPU to measure."""

    exit_code = 2


class Session:
    """What has been measured so far, in a file that is complete after every entry.

    Attributes:
        content: all of it.
        console: where it is printed.
    """

    def __init__(self, file: Path | None, minutes: float) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        self.begin = time.monotonic()
        self.content: dict[str, Any] = {"notes": []}
        self.console: Console = setting.make_console()

    def tell(self, text: str) -> None:
        """Print and keep a line that no table has."""
        self.console.print(text, highlight=False, markup=False)
        self.content["notes"].append(text)

    def save(self) -> None:
        """Write the file; a number that is not finite, as text."""
        content = self.content | {"seconds": time.monotonic() - self.begin}
        setting.write_json(
            self.file, tree_map(lambda x: str(x) if isinstance(x, float) and not isfinite(x) else x, content)
        )

    def take(self, items: Iterable[Item], name: Callable[[Item], str]) -> Iterator[Item]:
        """The items until the time is up; those that are left are named."""
        left = []
        for item in items:
            if time.monotonic() < self.end:
                yield item
            else:
                left.append(name(item))
        if left:
            self.tell(f"not measured, the time is up (--minutes): {', '.join(left)}")

    def try_part(self, what: str, part: Callable[[], None]) -> None:
        """Run a part; an error is told, and the next part goes on."""
        try:
            part()
        except Exception as error:
            self.tell(f"{what} failed: {setting.write_error(error)}")
        self.save()


def list_entries(backend: str) -> list[Entry]:
    """AdamW, the rules, with a bfloat16 state where that is most of it, and with what precisions there are."""
    entries = list_torch_entries()
    for name in RULES:
        entries.append(make_rule_entry(name, backend=backend))
        if name in RECURRENT:
            entries.append(make_rule_entry(name, BFLOAT16, backend=backend, state_dtype=torch.bfloat16))
        if name in ON_TENSOR_CORES:
            entries += [make_rule_entry(name, key, precision=key, backend=backend) for key in ("tf32", "bf16")]
    return entries


def judge(result: Result) -> list[dict[str, Any]]:
    """Each of an entry's targets with the figure, and whether it is reached."""
    targets = TARGETS.get(result["name"], []) + (OF_ALL_RULES if result["rule"] else [])
    return [
        {
            **target._asdict(),
            "value": result[target.figure],
            "reached": result[target.figure] <= target.must,
            "aim_reached": None if target.aim is None else result[target.figure] <= target.aim,
        }
        for target in targets
        if target.figure in result
    ]


def make_target_table(results: list[Result]) -> Table:
    """One row per entry and target."""
    heads = ("", "figure", "measured", "must be\nat most", "aim", "reached")
    table = setting.start_table("targets (of ViT-B/16 on an H200)", heads, texts=2)
    for result in results:
        for row in result["targets"]:
            reached = "aim" if row["aim_reached"] else "yes" if row["reached"] else "no"
            figures = (write_figure(row[key]) for key in ("value", "must", "aim"))
            table.add_row(result["name"], row["text"], *figures, reached)
    return table


def measure_targets(session: Session, model: str, device: torch.device, backend: str, **options: Any) -> None:
    """A model's table of all entries, and what of the targets is reached."""
    shapes = MODELS[model]
    count = sum(map(prod, shapes.values()))
    drawn = draw(shapes, torch.float32, device)
    results: list[Result] = []
    skipped: list[dict[str, str]] = []
    bandwidth = session.content["setting"]["bytes_per_second"]
    limit = 0.6 * setting.read_memory(device)
    session.console.print(describe_model(model), highlight=False, markup=False)
    session.content.setdefault("steps", {})[model] = {"results": results, "skipped": skipped}
    for entry in session.take(list_entries(backend), lambda entry: f"{entry.name} on {model}"):
        measured, left = measure_all([entry], shapes, drawn, limit, session.tell, graph=True, **options)
        results += measured
        skipped += left
        add_ratios(results, bandwidth, PARAMETER_BYTES, count)
        for result in measured:
            result["targets"] = judge(result)
        session.save()
    if results:
        session.console.print(make_table(results, count))
        tell_graphs(results, session.tell)
        session.console.print(make_target_table(results))


def profile_step(session: Session, model: str, device: torch.device, backend: str) -> None:
    """The kernels of one step of a rule, those that take longest first."""
    params = make_params(MODELS[model], draw(MODELS[model], torch.float32, device))
    step = make_rule_entry(PROFILED, backend=backend).start(params).step
    for _ in range(2):  # the first makes the state
        step()
    rows = cuda.group_launches(cuda.record_launches(step, device))
    session.content["profile"] = {"rule": PROFILED, "model": model, "kernels": rows}
    table = setting.start_table(f"one step of {PROFILED} on {model}", ("kernel", "launches", "us", "%"))
    for row in rows:
        table.add_row(
            *(row["name"][:100], str(row["launches"]), write_figure(1e6 * row["seconds"]), f"{100 * row['share']:.1f}")
        )
    session.console.print(table)


def measure_kernels(
    session: Session, ops: tuple[str, ...], device: torch.device, ways: tuple[str, ...], **options: Any
) -> None:
    """The table of `python -m bench kernels`."""
    results: list[dict[str, Any]] = []
    session.content["kernels"] = results

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        session.save()

    variants = session.take(list_variants(ops), lambda variant: f"kernel {variant.label}")
    count = None if device.type == "cuda" else CPU_COUNT
    bandwidth = session.content["setting"]["bytes_per_second"]
    if "compiled" in ways:
        kernels.warm_compiler(device)
    kernels.measure_all(variants, count, device, bandwidth, ways, tell=keep, **options)
    if results:
        session.console.print(kernels.make_table(results))
    for line in kernels.list_notes(results):
        session.tell(line)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Capability and processors, if it is one."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {"capability": f"sm_{found.major}{found.minor}", "processors": found.multi_processor_count}


@click.command()
@click.option("--device", "where", default="cuda", show_default=True, help='"cpu" is a dry run.')
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Repeatable.  [default: all]")
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="[default: vit and gpt2]")
@click.option("--op", "ops", multiple=True, type=click.Choice(list(list_ops())), help="Of the kernels.  [default: all]")
@click.option("--backend", default="auto", show_default=True, type=click.Choice(["auto", "torch", "triton"]))
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=MIN_REPEATS))
@click.option("--seconds", default=1.0, show_default=True, help=f"No repeat after these, but for {MIN_REPEATS}.")
@click.option("--minutes", default=5.0, show_default=True, help="Nothing new is begun after these.")
@click.option("--compile/--no-compile", "compiles", default=True, show_default=True, help="Time torch.compile, too.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def gpu(
    where: str,
    parts: tuple[str, ...],
    models: tuple[str, ...],
    ops: tuple[str, ...],
    backend: str,
    repeats: int,
    seconds: float,
    minutes: float,
    compiles: bool,
    file: Path | None,
) -> None:
    """Steps against their targets, the kernels of a step, and every kernel, on one GPU within five minutes."""
    device, parts = torch.device(where), parts or PARTS
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NoDeviceError("there is no CUDA device; --device cpu is a dry run of this command.")
    models = models or (("vit", "gpt2") if device.type == "cuda" else ("tiny",))
    options = {"repeats": repeats, "seconds": seconds}
    ways = kernels.WAYS if compiles else ("reference", "triton")
    session = Session(file, minutes)
    bandwidth = measure_bandwidth(device)
    told = {"device": setting.describe_device(device)} | describe_gpu(device) | setting.list_versions()
    told |= {"backend": backend, "memory bandwidth": f"{bandwidth / 1e9:.4g} GB/s"}
    setting.print_setting(session.console, told)
    session.content["setting"] = told | {"bytes_per_second": bandwidth, "seed": SEED, "dtype": "float32"}
    if device.type != "cuda":
        session.tell("a dry run without a GPU: no figure means anything")
    session.save()
    with setting.fresh_caches():
        for model in models if "targets" in parts else ():
            session.try_part(
                f"steps on {model}", lambda model=model: measure_targets(session, model, device, backend, **options)
            )
        if "profile" in parts:
            session.try_part("the profile", lambda: profile_step(session, models[0], device, backend))
        if "kernels" in parts:
            session.try_part("the kernels", lambda: measure_kernels(session, ops, device, ways, **options))
