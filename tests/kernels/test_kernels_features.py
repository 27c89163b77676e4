"""The three passes of the MLPs on features: each equals its reference, and all of them a rule's own steps."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import lopt_kernels
import pytest
import torch
from lopt_kernels import GROUP_OPS
from lopt_kernels.feature_mlp import (
    accumulate,
    fold,
    lines,
    mlp,
    moments,
    samples,
    scaled_move,
    table,
    tiling,
)
from lopt_kernels.feature_mlp.accumulate import Accumulated
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.mlp import MLPWeights
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.feature_mlp.tiling import Shape, TileChoice
from lopt_kernels.launching import clock, parameters
from lopt_kernels.launching.segments import Segments
from lopt_kernels.launching.tuning import Tile
from torch import Tensor

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = {
    "small_fc": Family(vector_eps=1e-6),
    "celo": Family(clips=True),
    "celo2_base": Family(clips=True, rs_eps=1e-8),
    "mlp": Family(momenta=6, factored=False),
    "velo": Family(clips=True),
}
BLOCK, STEPS = 32, 2  # smaller than in use: the shapes below cross every boundary
SHAPES = [(1,), (2 * BLOCK * STEPS + 1,), (7, 33), (40, 2), (9, 1), (3, 5, 2, 2), (0,), (4, 0), (0, 3)]
GUARD = 256
TOLERANCE = 1e-5  # order of summation, relative to a tensor's norm
ROUNDING = {
    torch.float32: TOLERANCE,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # cut off once, as in the interpreter
each_capability = pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])


def draw_group(family: Family, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Tensors]:
    return samples.draw_group(shapes, family, torch.Generator().manual_seed(0), dtype, DEVICE)


def assert_close(got: Tensor | None, want: Tensor | None, tolerance: float) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        error = torch.linalg.vector_norm(got.double() - want.double())
        assert error <= tolerance * torch.linalg.vector_norm(want.double())


def guard(tensor: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """A copy in the middle of a larger tensor full of `fill`, and that larger tensor."""
    buffer = tensor.new_full((tensor.numel() + 2 * GUARD,), fill)
    view = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor), buffer


def is_untouched(buffer: Tensor) -> bool:
    return bool(torch.cat([buffer[:GUARD], buffer[-GUARD:]]).isnan().all())


def take_weights(weights: MLPWeights, group: list[Tensors]) -> list[MLPWeights]:
    """Each parameter's rows."""
    counts = [t.groups for t in group]
    rows = zip(*(w.split(counts) for w in (weights.first, weights.bias, weights.gain)), strict=True)
    return [MLPWeights(first, bias, weights.rest, gain) for first, bias, gain in rows]


def draw_decays(family: Family) -> Tensor:
    return samples.draw_decays(family, DEVICE)


def divided(t: Tensors) -> list[Tensors]:
    """`t` `[3, 5, 2, 2]`, normalised in groups of trailing and of inner positions, and with other axes."""
    (like,) = draw_group(FAMILIES["celo"], shapes=[(5, 2, 3, 2)])  # its lines have the sizes of axes (1, 3)
    assert like.first is not None
    assert like.second is not None
    assert like.first_scale is not None
    assert like.second_scale is not None
    names = ("first", "second", "first_scale", "second_scale")
    sizes = {"first": (3, 3, 5, 2, 1), "second": (3, 3, 1, 2, 2)}
    drawn = {name: getattr(like, name).flatten() for name in names}
    lines = {name: drawn[name][: prod(size)].view(size) for n, size in sizes.items() for name in (n, f"{n}_scale")}
    other = t._replace(axes=(1, 3), rows=1, groups=4, **lines)
    return [t._replace(groups=4), t._replace(groups=2, inner=2), other]


def advance(t: Tensors, family: Family) -> Tensors:
    """`t` after the launches on accumulators."""
    rates, decays = parameters.sample_rates(DEVICE), draw_decays(family)
    if t.axes is not None and family.factored:
        t = t._replace(**lines.reference(t, decays, rates, family)._asdict())
    new = accumulate.reference(t, decays, rates, family)
    return t._replace(m=new.m, v=new.v, first=t.first if new.averages is None else new.averages)


# --- each pass ---


def test_group_ops_are_registered_under_their_own_names() -> None:
    assert all(op.name == name for name, op in GROUP_OPS.items())


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_lines_equal_reference(dtype: torch.dtype) -> None:
    family, decays = FAMILIES["celo"], draw_decays(FAMILIES["celo"])
    shapes = [(7, 33), (9, 1), (3, 5, 2, 2), (lines.CHUNK + 3, 2), (2, lines.LENGTH + 1), (4, 0), (0, 3)]
    group = draw_group(family, dtype, shapes)
    for axes in ((1, 3), (0, 2)):
        (t,) = draw_group(family, dtype, [(3, 5, 2, 2)])
        first, second = ([3, *(1 if i == axis else n for i, n in enumerate(t.p.shape))] for axis in axes[::-1])
        averages = [torch.rand(shape, generator=torch.Generator().manual_seed(1)) for shape in (first, second)]
        group.append(t._replace(axes=axes, first=averages[0].to(DEVICE), second=averages[1].to(DEVICE)))
    group += [t._replace(rows=1) for t in group]
    rates = parameters.sample_rates(DEVICE)
    for t, made in zip(group, lines.launch(group, decays, rates, family), strict=True):
        for got, want in zip(made, lines.reference(t, decays, rates, family), strict=True):
            assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("small_fc", torch.float32), ("celo", torch.bfloat16), ("celo2_base", torch.float16), ("mlp", torch.float32)],
)
def test_accumulators_and_sums_equal_reference(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    group, decays, rates = draw_group(family, dtype), draw_decays(family), parameters.sample_rates(DEVICE)
    group += divided(group[5]) if family.factored else []
    launched = accumulate.launch(group, decays, rates, family, tile=Tile(BLOCK, STEPS))
    for t, new in zip(group, launched, strict=True):
        want = accumulate.reference(t, decays, rates, family)
        for name, tensor in new._asdict().items():
            assert_close(tensor, getattr(want, name), TOLERANCE)


def make_choice(shape: Shape, precision: str = "ieee") -> TileChoice:
    return tiling.choose_tiles(shape, precision)._replace(block=BLOCK, steps=STEPS)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        (FAMILIES["small_fc"], Shape(hidden=17, layers=1)),
        (FAMILIES["celo2_base"], Shape(hidden=2, layers=2, outputs=1, exp_mult=0.0)),
        (FAMILIES["mlp"], Shape(hidden=16, layers=3)),
    ],
)
@pytest.mark.parametrize("delta", [False, True])
def test_mlp_equals_reference(family: Family, shape: Shape, delta: bool) -> None:
    group, rates = draw_group(family), parameters.sample_rates(DEVICE)
    group += divided(group[5]) if family.factored else []
    weights = mlp.draw_weights(group, rates, family, shape, torch.Generator().manual_seed(1))
    launched = mlp.launch(group, weights, rates, family, shape, make_choice(shape), delta=delta)
    for t, own, got in zip(group, take_weights(weights, group), launched, strict=True):
        assert_close(got, mlp.reference(t, own, rates, family, shape, delta=delta), TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bf16", 2e-2)])
def test_mlp_on_tensor_cores_is_as_precise_as_their_inputs(precision: str, tolerance: float) -> None:
    family, shape = FAMILIES["small_fc"], Shape(hidden=16)
    group, rates = draw_group(family, shapes=[(3, 40)]), parameters.sample_rates(DEVICE)
    weights = mlp.draw_weights(group, rates, family, shape, torch.Generator().manual_seed(1))
    (got,) = mlp.launch(group, weights, rates, family, shape, make_choice(shape, precision), delta=True)
    assert_close(got, mlp.reference(group[0], weights, rates, family, shape, delta=True), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mlp_rounds_a_parameter_once(dtype: torch.dtype) -> None:
    family, shape = FAMILIES["celo"], Shape(hidden=2)
    group, rates = draw_group(family, dtype, [(3, 40), (5,)]), parameters.sample_rates(DEVICE)
    weights = mlp.draw_weights(group, rates, family, shape, torch.Generator().manual_seed(1))
    launched = mlp.launch(group, weights, rates, family, shape, make_choice(shape))
    for t, own, got in zip(group, take_weights(weights, group), launched, strict=True):
        assert_close(got, mlp.reference(t, own, rates, family, shape), ROUNDING[dtype])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_fold_equals_reference(name: str) -> None:
    family = FAMILIES[name]
    group, rates, decays = draw_group(family), parameters.sample_rates(DEVICE), draw_decays(family)
    group += divided(group[5]) if family.factored else []
    sample = fold.sample(0, torch.Generator().manual_seed(2), torch.float32, DEVICE, family, Shape(hidden=17, layers=2))
    sums = [accumulate.reference(t, decays, rates, family).squares for t in group]
    given = sample | {"group": group, "sums": sums, "steps": torch.arange(len(group), device=DEVICE) * 7}
    given |= {"factor": torch.linspace(-1, 2, len(group), device=DEVICE)}
    for i, got in enumerate(fold.launch(**given)):
        want = fold.reference(
            *(sums[i], group[i], given["weights"][0], given["steps"][i : i + 1], given["factor"][i : i + 1]),
            *(family, given["shape"], given["network"]),
        )
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.contiguous(), TOLERANCE)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_clock_equals_reference(dtype: torch.dtype) -> None:
    for size in (0, 1, 4 * clock.BLOCK + 5):
        given = clock.sample(size, torch.Generator().manual_seed(0), dtype, DEVICE)
        for found_inf, sanitize in ((None, False), (None, True), (0.0, False), (1.0, False)):
            scaler = None if found_inf is None else torch.tensor([found_inf], device=DEVICE)
            told = given | {"found_inf": scaler, "sanitize": sanitize}
            got, want = clock.launch(**told), clock.reference(**told)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_moments_equal_reference(dtype: torch.dtype) -> None:
    group = draw_group(FAMILIES["velo"], dtype, [(1,), (7, 33), (0,), (2, moments.BLOCK * moments.STEPS)])
    for t, got in zip(group, moments.launch(group), strict=True):
        torch.testing.assert_close(got, moments.reference(t), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("shape", "groups", "inner"), [((), 1, 1), ((0,), 1, 1), ((5, 6), 3, 2), ((3, 900), 1, 1)])
def test_scaled_move_equals_reference(dtype: torch.dtype, shape: tuple[int, ...], groups: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p, delta = torch.randn((2, *shape), generator=generator).to(DEVICE)
    rates, p = parameters.sample_rates(DEVICE), p.to(dtype)
    got = scaled_move.launch(p, delta, rates, 0.3, groups, inner)
    assert_close(got, scaled_move.reference(p, delta, rates, 0.3, groups, inner), ROUNDING[dtype])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(hidden=tiling.MAX_HIDDEN + 1), "hidden must be 1 to 128"),
        (Shape(hidden=4, outputs=1), "or 1 with exp_mult 0"),
    ],
)
def test_plan_names_what_the_mlp_kernel_cannot_take(shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiling.choose_tiles(shape)
    with pytest.raises(ValueError, match="precision must be one of"):
        tiling.choose_tiles(Shape(hidden=4), "fp8")


# --- properties of the launches ---


def run_passes(group: list[Tensors], drawn: list[Tensors], family: Family, live: Tensor | None = None) -> list[Tensor]:
    """The sums, and parameters and accumulators after the launches in place; weights that suit the group as `drawn`."""
    shape, tile = Shape(hidden=1), Tile(BLOCK, STEPS)
    segments = Segments(
        [part for i, t in enumerate(group) for part in table.make_segments(t, i, BLOCK)],
        table.by_tiles(BLOCK, STEPS),
    )
    one = parameters.sample_rates(DEVICE)
    rates = parameters.Rates(*(x.expand(len(group)).contiguous() for x in one))
    items = parameters.make_items([t.g for t in group], rates, live)
    matrices = [(i, t) for i, t in enumerate(group) if t.axes is not None and family.factored]
    if matrices:
        lines.launch_segments(lines.make_lines(matrices), draw_decays(family)[None], items, family)
    drawn = [advance(t, family) for t in drawn]
    weights = mlp.draw_weights(drawn, one, family, shape, torch.Generator().manual_seed(1))
    sums = accumulate.launch_segments(segments, draw_decays(family)[None], items, family, tile=tile)
    mlp.launch_segments(segments, weights, items, family, shape, make_choice(shape))
    return [sums, *(x for t in group for x in (t.p, t.m, t.v, t.first) if x is not None)]


def copy_guarded(group: list[Tensors]) -> tuple[list[Tensors], list[Tensor]]:
    """Copies whose surroundings are NaN: read they would spread, written they would be gone."""
    copies, buffers = [], []
    for t in group:
        known: dict[int, Tensor] = {}
        for tensor in t:
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                known[id(tensor)], buffer = guard(tensor, torch.nan)
                buffers.append(buffer)
        copies.append(Tensors(*(known[id(x)] if isinstance(x, Tensor) else x for x in t)))
    return copies, buffers


@pytest.mark.parametrize("family", [FAMILIES["small_fc"], FAMILIES["mlp"]])
def test_passes_stay_inside_their_tensors_and_repeat_bit_for_bit(family: Family) -> None:
    group = draw_group(family)
    copies, buffers = copy_guarded(group)
    first = run_passes(copies, group, family)
    assert all(is_untouched(buffer) for buffer in buffers)
    assert all(x.isfinite().all() for x in first)
    second = run_passes(copy_guarded(group)[0], group, family)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_segment_that_is_not_live_keeps_every_bit() -> None:
    family = FAMILIES["celo"]
    group = draw_group(family, shapes=[(3, 20), (5,), (3, 20)])
    copies, _ = copy_guarded(group)
    copies[0].g.fill_(torch.nan)
    live = torch.tensor([False, True, True], device=DEVICE)
    run_passes(copies, group, family, live)
    for i, (new, old) in enumerate(zip(copies, group, strict=True)):
        assert torch.equal(new.p, old.p) == torch.equal(new.m, old.m) == (not live[i])


def test_nan_stays_in_its_tensor() -> None:
    family = FAMILIES["small_fc"]
    group = draw_group(family, shapes=[(3, 20), (5,), (3, 20)])
    want = run_passes(copy_guarded(group)[0], group, family)
    copies, _ = copy_guarded(group)
    copies[1].g[2] = torch.nan
    got = run_passes(copies, group, family)
    changed = [not torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True)]
    assert changed == [i in range(4, 8) for i in range(12)]  # p, m, v, first of the second of three
    assert copies[1].m[:, 2].isnan().all()
    assert copies[1].p.isnan().tolist() == [False, False, True, False, False]  # of these weights, NaN or not


# --- compilation ---


@cache
def compile_all(capability: int) -> str:
    code = f"""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lopt_kernels.feature_mlp import accumulate, lines, mlp
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.table import WIDE
from lopt_kernels.feature_mlp.tiling import Shape, choose_tiles
celo, wide = Family(clips=True), 1 << WIDE
for name, source in {{
    "lines": lines.compile_source(torch.bfloat16),
    "accumulate": accumulate.compile_source(torch.float32, kinds=wide),
    "fma": mlp.compile_source(torch.float32, celo, Shape(2), kinds=wide),
    "dot": mlp.compile_source(torch.float32, shape=Shape(32), choice=choose_tiles(Shape(32), "tf32"), kinds=wide),
}}.items():
    kernel = triton.compile(
        ASTSource(source.kernel, source.signature, source.constexprs),
        target=GPUTarget("cuda", {capability}, 32),
        options=source.options,
    )
    products = [line for line in kernel.asm["ttir"].splitlines() if "arith.muli" in line]
    print(name, "mma" in kernel.asm["ptx"], all("i64" in line for line in products))
"""
    path = os.pathsep.join([str(Path(lopt_kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@each_capability
def test_passes_compile_and_multiply_offsets_as_64_bit(capability: int) -> None:
    assert compile_all(capability).splitlines() == [
        "lines False True",
        "accumulate False True",
        "fma False True",
        "dot True True",
    ]


def test_reference_of_the_passes_leaves_its_inputs_untouched() -> None:
    family = FAMILIES["celo"]
    (t,) = draw_group(family, shapes=[(5,)])
    before = [x.clone() for x in t if isinstance(x, Tensor)]
    new = accumulate.reference(t, draw_decays(family), parameters.sample_rates(DEVICE), family)
    assert isinstance(new, Accumulated)
    assert all(torch.equal(a, b) for a, b in zip(before, [x for x in t if isinstance(x, Tensor)], strict=True))
