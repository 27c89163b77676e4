"""Measure tiles of the two kernels that take most of a feature MLP's step, and keep the best for later runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from lopt_kernels import OPS
from lopt_kernels.feature_mlp import accumulate, lines, mlp, tiling
from lopt_kernels.feature_mlp.mlp import MLPWeights
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.launching import parameters, tuning
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.tuning import Tile
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.entries import PRECISIONS, SEED, draw, step_with_precision
from bench.gpu import replay
from bench.gpu.gpu import NoDeviceError, describe_gpu
from bench.models import MODELS, Shapes
from bench.setting import DTYPES, INTERPRETED, write_figure
from bench.speed.step import Drawn, describe_model
from bench.timing import measure_bandwidth, summarize, time_first, time_queued
from lopt.optim.state_dict import init_state
from lopt.optim.triton_backend.parts import make_part
from lopt.optim.units import make_member
from lopt.rules import RULES
from lopt.rules.building_blocks.feature_mlp import FeatureMLP
from lopt.rules.programs.descriptions import describe_view
from lopt.rules.programs.features import FeatureProgram, UnitProgram, find_kinds, make_table
from lopt.rules.programs.registry import FUSED
from lopt.rules.programs.views import ParameterView

SAME = ("celo2",)  # its kernels are those of celo2_base, but it leaves vectors to AdamW
TUNED = [name for name, program in FUSED.items() if issubclass(program, FeatureProgram) and name not in SAME]
CANDIDATES = {
    "accumulate": [Tile(*sizes) for sizes in product((128, 256, 512, 1024), (8, 16, 32, 64), (2, 4, 8))],
    "mlp": [Tile(*sizes) for sizes in product((64, 128, 256), (8, 16, 32, 64), (2, 4, 8))],
}
CPU_CANDIDATES = {"accumulate": [Tile(128, 8, 2)], "mlp": [Tile(64, 8, 2)]}  # of a dry run
HOPELESS = 2.0  # times as slow as the default: with other steps it is no better, and compiling takes long
FASTER = 1.03  # what is not faster by this factor may be so by chance
TOLERANCE = 2e-2  # relative, of each tensor: no rounding does more, not even that of bf16 products
MIN_REPEATS, SECONDS = 10, 60.0
HEADS = ("block", "steps", "warps", "ms", "p10 - p90", "GB/s", "compile\nseconds", "x default")
Row = dict[str, Any]


class Prepared(NamedTuple):
    """A launch with the tables for one tile.

    Attributes:
        launch: one launch, in place.
        read: what it returned -> tensors that do not depend on the tile.
    """

    launch: Callable[[], Any]
    read: Callable[[Any], list[Tensor]]


class Case(NamedTuple):
    """A kernel on copies of a model's parameters.

    Attributes:
        rule, op: their names.
        signature: of the kernel, see `tuning.find`.
        default: the tile that it has without a measurement.
        prepare: makes what a tile needs.
        changed: what a launch changes in place.
        saved: copies of that.
        num_bytes: that a launch has to move.
    """

    rule: str
    op: str
    signature: str
    default: Tile
    prepare: Callable[[Tile], Prepared]
    changed: list[Tensor]
    saved: list[Tensor]
    num_bytes: int

    def restore(self) -> None:
        """Undo all launches."""
        for x, old in zip(self.changed, self.saved, strict=True):
            x.copy_(old)


class Group(NamedTuple):
    """A model's parameters, all of one dtype, and what a rule's kernels are given with them.

    Attributes:
        program: of the rule.
        parts, tensors: copies of the parameters, and their state.
        items: gradients and rates.
        weights: networks for all segments.
    """

    program: FeatureProgram
    parts: list[ParameterView]
    tensors: list[Tensors]
    items: Items
    weights: MLPWeights


def make_group(name: str, shapes: Shapes, drawn: Drawn) -> Group:
    """A rule on copies of the drawn parameters, with a fresh state."""
    device, n = drawn[0][0].device, len(shapes)
    rule = RULES[name]().to(device).requires_grad_(False)
    assert isinstance(rule, FeatureMLP), "`TUNED` names these"
    parts = []
    for i, (key, p, g) in enumerate(zip(shapes, *drawn, strict=True)):
        member = make_member(key, p.clone(), g, init_state(rule, p, None, guarded=False))
        parts.append(make_part(i, member, rule.tensor_keys, partial(FUSED[name].suits, rule)))
    program = FUSED[name](rule, [parts], n)
    assert isinstance(program, FeatureProgram), "likewise"
    tensors = [describe_view(rule, part, program.slot(part)) for part in parts]
    rates = parameters.Rates(
        *(torch.full((n,), number, device=device, dtype=torch.float32) for number in (1.0, 0.0, 1.0))
    )
    items = parameters.make_items(drawn[1], rates)
    factored = [(part.number, t) for part, t in zip(parts, tensors, strict=True) if t.axes and t.p.numel()]
    if factored:
        lines.launch_segments(lines.make_lines(factored), program.decays, items, program.family)
    return Group(program, parts, tensors, items, draw_weights(program, tensors))


def make_cases(name: str, shapes: Shapes, drawn: Drawn) -> Iterator[Case]:
    """Both kernels of a rule."""
    group = make_group(name, shapes, drawn)
    program, tensors, device, dtype = group.program, group.tensors, drawn[0][0].device, drawn[0][0].dtype
    count = sum(t.p.numel() for t in tensors)
    sizes = count, program.family, dtype.itemsize, dtype.itemsize

    vectors = [t.first for t in tensors if t.axes is None]
    state = [x for t in tensors for x in (t.m, t.v)] + vectors
    changed = [x for x in state if x is not None]
    prepare: Callable[[Tile], Prepared] = partial(prepare_accumulate, group)
    key = accumulate.sign(program.family, dtype)
    moved = accumulate.bytes_moved(*sizes)
    yield Case(name, "accumulate", key, accumulate.TILE, prepare, changed, [x.clone() for x in changed], moved)

    out = torch.zeros(count, device=device, dtype=torch.float32) if isinstance(program, UnitProgram) else None
    prepare = partial(prepare_mlp, group, out)
    key = tiling.sign(program.family, program.shape, program.choice, dtype)
    changed = [t.p for t in tensors] if out is None else [out]
    moved = mlp.bytes_moved(*sizes)
    yield Case(name, "mlp", key, program.choice.tile, prepare, changed, [x.clone() for x in changed], moved)


def prepare_accumulate(group: Group, tile: Tile) -> Prepared:
    """`accumulate` with a tile; it returns sums of blocks, to be added up for each segment."""
    program, parts, tensors, items, _ = group
    _, choice = program.find_tiles(tensors[0].p)
    table, kinds = make_table(parts, tensors, tile), find_kinds(tensors, (tile, choice.tile))
    rest, counts = (table, program.decays, items, program.family), table.starts.diff().tolist()
    launch = partial(accumulate.launch_segments, *rest, kinds=kinds, tile=tile)
    return Prepared(launch, lambda sums: [own.sum(0) for own in sums.split(counts)])


def prepare_mlp(group: Group, out: Tensor | None, tile: Tile) -> Prepared:
    """`mlp` with a tile; it returns nothing."""
    program, parts, tensors, items, weights = group
    other, _ = program.find_tiles(tensors[0].p)
    table, kinds = make_table(parts, tensors, tile), find_kinds(tensors, (tile, other))
    rest = (program.family, program.shape, program.choice._replace(**tile._asdict()))
    return Prepared(partial(mlp.launch_segments, table, weights, items, *rest, out=out, kinds=kinds), lambda _: [])


def draw_weights(program: FeatureProgram, tensors: list[Tensors]) -> MLPWeights:
    """Random networks of all segments; small ones: inputs are not normalised here."""
    shape, device = program.shape, program.decays.device
    n, num_slots = sum(t.groups for t in tensors), 1 + max(t.slot for t in tensors)
    randn = partial(torch.randn, generator=torch.Generator(device).manual_seed(SEED), device=device)
    first, rest = 1e-3 * randn(n, shape.hidden, program.family.num_inputs), randn(num_slots, shape.num_rest)
    return MLPWeights(first, randn(n, shape.hidden), rest * shape.hidden**-0.5, 0.1 * randn(n).exp())


def measure(case: Case, tile: Tile, want: list[Tensor], repeats: int, seconds: float) -> Row:
    """Seconds (median, p10, p90) of queued launches, and what compiling takes at the first; interpreted, nothing does.

    Args:
        want: what the default made of the same; empty: it is filled, for the others.
    Raises:
        RuntimeError: the result is another one.
    """
    device = case.changed[0].device
    prepared = case.prepare(tile)
    case.restore()
    recorded: list[replay.Recording] = []
    first = time_first(lambda: recorded.append(replay.record(prepared.launch)), device)
    got = [*prepared.read(recorded[0].result), *case.changed]
    if want:
        check_same(got, want)
    else:
        want += [x.clone() for x in got]
    told = summarize(time_queued(recorded[0].__call__, repeats, seconds, device))
    row = tile._asdict() | {"seconds": told, "gb_per_second": None, "compile_seconds": None}
    if device.type == "cuda":
        rate, compiling = case.num_bytes / told["median"] / 1e9, max(0.0, first - told["median"])
        row |= {"gb_per_second": rate, "compile_seconds": compiling}
    return row


def check_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Each tensor is the other one but for rounding.

    Raises:
        RuntimeError: it is not.
    """
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    pairs = zip(got, want, strict=True)
    same = [norm(a.float() - b.float()) <= TOLERANCE * norm(b.float()) for a, b in pairs]
    if not torch.stack(same).all():
        raise RuntimeError("the result is not the default's")


def tune_case(case: Case, candidates: Iterable[Tile], repeats: int, seconds: float) -> dict[str, Any]:
    """All candidates; the best and the default are measured once more, one after the other, and compared then.

    Returns:
        `rows`, that of the default first; `failed`, the candidates that do not compile, need more than there is, or
        are wrong, with their `error`; `passed_over`, how many were not tried as one with the same block and warps had
        failed or was `HOPELESS`; `best` with its figures, of the second measurement, and `faster`, how many times as
        fast as the default it is.
    """
    want: list[Tensor] = []
    rows, failed, passed_over = [measure(case, case.default, want, repeats, seconds) | {"faster": 1.0}], [], 0
    hopeless: set[tuple[int, int]] = set()
    for tile in candidates:
        if tile == case.default:
            continue
        if (tile.block, tile.warps) in hopeless:
            passed_over += 1
            continue
        try:
            row = measure(case, tile, want, repeats, seconds)
            rows.append(row | {"faster": rows[0]["seconds"]["median"] / row["seconds"]["median"]})
            failing = rows[-1]["faster"] < 1 / HOPELESS
        except Exception as error:  # the others are measured all the same
            failed.append(tile._asdict() | {"error": setting.write_error(error)})
            failing = True
        if failing:
            hopeless.add((tile.block, tile.warps))
    best = max(rows, key=lambda row: row["faster"])
    if best is not rows[0]:
        again = [measure(case, take_tile(row), want, repeats, seconds) for row in (rows[0], best)]
        faster = again[0]["seconds"]["median"] / again[1]["seconds"]["median"]
        best = again[1] | {"compile_seconds": best["compile_seconds"], "faster": faster}
    named = {"rule": case.rule, "op": case.op, "signature": case.signature}
    return named | {"rows": rows, "failed": failed, "passed_over": passed_over, "best": best}


def take_tile(row: Row) -> Tile:
    """The tile that was measured."""
    return Tile(*(row[name] for name in Tile._fields))


def keep(case: Case, best: Row, device: torch.device, dry: bool) -> str:
    """Store the best tile if it is clearly faster, or else the default if another one is stored; and say so."""
    tile = take_tile(best)
    text = f"{tile} is {best['faster']:.3f} x as fast as the default"
    if best["faster"] <= FASTER:
        tile, text = case.default, f"nothing is more than {100 * FASTER - 100:.0f} % faster than the default"
    if dry:
        return f"{text}; nothing is stored"
    if tile == tuning.find(case.op, case.signature, case.default, device):
        return f"{text}; what is stored stays"
    figures = {"ms": 1e3 * best["seconds"]["median"], "compile_seconds": best["compile_seconds"]}
    file = tuning.store(case.op, case.signature, tile, device, **(figures if tile != case.default else {}))
    return f"{text}; stored in {file}"


def make_result_table(result: dict[str, Any]) -> Table:
    """One row per candidate, the fastest first."""
    table = setting.start_table(f"{result['op']} of {result['rule']}", HEADS, texts=0)
    for row in sorted(result["rows"], key=lambda row: row["seconds"]["median"]):
        ms = {key: write_figure(1e3 * value) for key, value in row["seconds"].items()}
        mark = " (default)" if row is result["rows"][0] else ""
        table.add_row(
            *(str(size) for size in take_tile(row)),
            *(ms["median"], f"{ms['p10']} - {ms['p90']}", write_figure(row["gb_per_second"])),
            *(write_figure(row["compile_seconds"]), f"{row['faster']:.3f}{mark}"),
        )
    return table


def list_left_out(result: dict[str, Any]) -> Iterator[str]:
    """A line for each kind of error, how often and the first, and one for candidates that were not tried."""
    kinds: dict[str, list[str]] = {}
    for row in result["failed"]:
        kinds.setdefault(row["error"].partition(":")[0], []).append(f"{take_tile(row)}: {row['error']}")
    for errors in kinds.values():
        yield f"{len(errors)} left out, such as {errors[0]}"
    if result["passed_over"]:
        count = result["passed_over"]
        yield f"{count} not tried: with the same block and warps one failed or took {HOPELESS:g} x as long"


def warm_up(device: torch.device) -> None:
    """Let Triton set itself up: that is not what compiling a kernel takes."""
    inputs = OPS["adamw"].sample(64, torch.Generator(device).manual_seed(SEED), torch.float32, device)
    OPS["adamw"].launch(**inputs)


@click.command()
@click.option("--rule", "rules", multiple=True, type=click.Choice(TUNED), help="Repeatable.  [default: all]")
@click.option("--model", type=click.Choice(list(MODELS)), help="[default: vit]")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)), help="Of parameters.")
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(list(PRECISIONS)), help="Repeatable.  [default: ieee]"
)
@click.option("--repeats", default=20, show_default=True, type=click.IntRange(min=MIN_REPEATS))
@click.option("--dry", is_flag=True, help="Store nothing.")
@click.option("--device", "where", default="cuda", show_default=True, help='"cpu" is a dry run, interpreted.')
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def tune(
    rules: tuple[str, ...],
    model: str | None,
    dtype: str,
    precisions: tuple[str, ...],
    repeats: int,
    dry: bool,
    where: str,
    file: Path | None,
) -> None:
    """Measure tiles of the kernels of feature MLPs on this GPU, and store those that are faster than the defaults.

    Later runs on a GPU of this kind use them. It takes minutes, most of them to compile candidates.
    """
    device = torch.device(where)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise NoDeviceError("there is no CUDA device; --device cpu is a dry run of this command.")
    if not on_gpu and not setting.is_interpreted():
        raise click.ClickException("without a GPU kernels are interpreted: set TRITON_INTERPRET=1 and run this again.")
    model = model or ("vit" if on_gpu else "tiny")
    shapes, bandwidth = MODELS[model], measure_bandwidth(device) if on_gpu else None
    told = {"model": describe_model(model), "dtype": dtype, "device": setting.describe_device(device)}
    told |= describe_gpu(device) | setting.list_versions() | {"repeats": repeats if on_gpu else INTERPRETED}
    told |= {"memory bandwidth": f"{bandwidth / 1e9:.4g} GB/s"} if bandwidth else {}
    console, drawn = setting.make_console(), draw(shapes, DTYPES[dtype], device)
    setting.print_setting(console, told)
    results: list[dict[str, Any]] = []
    known: set[tuple[str, str]] = set()

    def tell(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def tune_rule(name: str) -> None:
        for case in make_cases(name, shapes, drawn):
            tell(f"{case.op} of {name}: {case.signature}")
            if (case.op, case.signature) in known:
                tell("measured already, for another rule")
                continue
            known.add((case.op, case.signature))
            candidates = (CANDIDATES if on_gpu else CPU_CANDIDATES)[case.op]
            result = tune_case(case, candidates, repeats, SECONDS if on_gpu else 0.0)
            console.print(make_result_table(result))
            for line in (*list_left_out(result), keep(case, result["best"], device, dry or not on_gpu)):
                tell(line)
            results.append(result)
            setting.write_json(file, {"setting": told | {"seed": SEED}, "results": results})

    with setting.fresh_caches():
        warm_up(device)
        for name in rules or TUNED:
            for precision in precisions or ("ieee",):
                step_with_precision(partial(tune_rule, name), PRECISIONS[precision])
