"""The three passes of the MLPs on features: each equals its reference, and all of them a rule's own steps."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lopt_kernels
import pytest
import torch
from lopt_kernels import GROUP_OPS, accumulate, apply, features, lines, mlp
from lopt_kernels.accumulate import Accumulated
from lopt_kernels.features import Family, Tensors
from lopt_kernels.mlp import MLPWeights, Plan, Shape
from lopt_kernels.segments import Segments
from torch import Tensor, nn

from lopt.optim import LearnedOptimizer
from lopt.rules import RULES, Clock, Elements, Rule, find_layout
from lopt.rules.base import count_elements

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
CAPABILITIES = (80, 90)


def draw_group(family: Family, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Tensors]:
    return features.draw_group(shapes, family, torch.Generator().manual_seed(0), dtype, DEVICE)


def draw_decays(family: Family) -> Tensor:
    momenta = [0.1, 0.9, 0.99, 0.999, 0.5, 0.95]  # the first one is on the other side of torch.lerp's formula
    return torch.tensor([*momenta[: family.momenta], 0.999, 0.9, 0.99, 0.999], device=DEVICE)


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
    return [MLPWeights(*rows) for rows in zip(*(w.split(counts) for w in weights), strict=True)]


# --- each pass ---


def test_group_ops_are_registered_under_their_own_names() -> None:
    assert all(op.name == name for name, op in GROUP_OPS.items())


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_line_means_equal_reference(dtype: torch.dtype) -> None:
    family = FAMILIES["celo"]
    group = [t for t in draw_group(family, dtype, [(7, 33), (9, 1), (3, 5, 2, 2), (lines.CHUNK + 3, 2)]) if t.axes]
    group.append(group[2]._replace(axes=(1, 3)))
    group.append(group[2]._replace(axes=(0, 2)))
    group += draw_group(family, dtype, [(4, 0), (0, 3)])
    terms = apply.sample_terms(DEVICE)
    for t, means in zip(group, lines.launch(group, terms, family), strict=True):
        for got, want in zip(means, lines.reference(t, terms, family), strict=True):
            assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("small_fc", torch.float32), ("celo", torch.bfloat16), ("celo2_base", torch.float16), ("mlp", torch.float32)],
)
def test_accumulators_and_sums_equal_reference(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    group, decays, terms = draw_group(family, dtype), draw_decays(family), apply.sample_terms(DEVICE)
    group.append(group[5]._replace(groups=4))
    launched = accumulate.launch(group, decays, terms, family, tile=(BLOCK, STEPS))
    for t, new in zip(group, launched, strict=True):
        want = accumulate.reference(t, decays, terms, family)
        for name, tensor in new._asdict().items():
            assert_close(tensor, getattr(want, name), TOLERANCE)


def make_plan(shape: Shape, precision: str = "ieee") -> Plan:
    return mlp.choose_plan(shape, precision)._replace(block=BLOCK, steps=STEPS)


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
    group, terms = draw_group(family), apply.sample_terms(DEVICE)
    group.append(group[5]._replace(groups=4))
    weights = mlp.draw_weights(group, terms, family, shape, torch.Generator().manual_seed(1))
    launched = mlp.launch(group, weights, terms, family, shape, make_plan(shape), delta=delta)
    for t, own, got in zip(group, take_weights(weights, group), launched, strict=True):
        assert_close(got, mlp.reference(t, own, terms, family, shape, delta=delta), TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bf16", 2e-2)])
def test_mlp_on_tensor_cores_is_as_precise_as_their_inputs(precision: str, tolerance: float) -> None:
    family, shape = FAMILIES["small_fc"], Shape(hidden=16)
    group, terms = draw_group(family, shapes=[(3, 40)]), apply.sample_terms(DEVICE)
    weights = mlp.draw_weights(group, terms, family, shape, torch.Generator().manual_seed(1))
    (got,) = mlp.launch(group, weights, terms, family, shape, make_plan(shape, precision), delta=True)
    assert_close(got, mlp.reference(group[0], weights, terms, family, shape, delta=True), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mlp_rounds_a_parameter_once(dtype: torch.dtype) -> None:
    family, shape = FAMILIES["celo"], Shape(hidden=2)
    group, terms = draw_group(family, dtype, [(3, 40), (5,)]), apply.sample_terms(DEVICE)
    weights = mlp.draw_weights(group, terms, family, shape, torch.Generator().manual_seed(1))
    launched = mlp.launch(group, weights, terms, family, shape, make_plan(shape))
    for t, own, got in zip(group, take_weights(weights, group), launched, strict=True):
        assert_close(got, mlp.reference(t, own, terms, family, shape), ROUNDING[dtype])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(hidden=mlp.MAX_HIDDEN + 1), "hidden must be 1 to 128"),
        (Shape(hidden=4, outputs=1), "or 1 with exp_mult 0"),
    ],
)
def test_plan_names_what_the_mlp_kernel_cannot_take(shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp.choose_plan(shape)
    with pytest.raises(ValueError, match="precision must be one of"):
        mlp.choose_plan(Shape(hidden=4), "fp8")


# --- properties of the launches ---


def run_passes(group: list[Tensors], drawn: list[Tensors], family: Family, live: Tensor | None = None) -> list[Tensor]:
    """The sums, and parameters and accumulators after the launches in place; weights that suit the group as `drawn`."""
    shape, tile = Shape(hidden=1), (BLOCK, STEPS)
    parts = [part for t in group for part in features.make_segments(t, BLOCK)]
    segments = Segments(parts, features.by_tiles(*tile))
    live = torch.ones(len(parts), dtype=torch.bool, device=DEVICE) if live is None else live
    one = apply.sample_terms(DEVICE)
    terms = apply.Terms(*(x.expand(len(parts)).contiguous() for x in one))
    weights = mlp.draw_weights(drawn, one, family, shape, torch.Generator().manual_seed(1))
    sums = accumulate.launch_segments(segments, draw_decays(family)[None], terms, live, family, tile=tile)
    mlp.launch_segments(segments, weights, terms, live, family, shape, make_plan(shape))
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


# --- a rule's steps ---


class Grouped:
    """A rule's steps by the kernels, with the rule's own folds between them."""

    def __init__(self, rule: Any, params: list[Tensor]) -> None:
        self.rule, self.family = rule, FAMILIES[rule.name]
        hidden = rule.widths[1:-1]
        self.shape = Shape(hidden[0], len(hidden), rule.widths[-1], rule.exp_mult if rule.widths[-1] > 1 else 0.0)
        self.plan = make_plan(self.shape)
        self.layouts = [find_layout(tuple(p.shape)) for p in params]
        self.params = [p.view(layout.shape) for p, layout in zip(params, self.layouts, strict=True)]
        self.accs = [rule.init_accumulators(p, x) for p, x in zip(self.params, self.layouts, strict=True)]

    def describe(self, i: int, g: Tensor) -> Tensors:
        """One parameter; lines in the order of their axes in memory."""
        layout, acc = self.layouts[i], self.accs[i]
        t = Tensors(self.params[i], g.reshape(layout.shape).contiguous(), acc["m"], acc.get("v"))
        axes = self.rule.norm_axes(layout) if self.family.factored else layout.axes
        t = t._replace(groups=t.p.numel() // count_elements(axes, layout))
        if layout.factored is not None and self.family.factored:
            one, two = sorted(axis % layout.ndim for axis in layout.factored)
            names = self.name_lines(i)
            averages, scales = ([acc[name + end] for name in names] for end in ("s", "_scale"))
            return t._replace(
                axes=(one, two),
                first=averages[0],
                second=averages[1],
                first_scale=scales[0],
                second_scale=scales[1],
            )
        return t._replace(first=acc.get("averages"), second=acc.get("averages"))

    def name_lines(self, i: int) -> tuple[str, str]:
        """The rule's names, without ending, of the means over the later axis and over the earlier one."""
        larger, smaller = self.layouts[i].factored or (0, 0)
        return ("row", "col") if larger > smaller else ("col", "row")

    def step(self, grads: list[Tensor], count: int, loss: Tensor, num_steps: int, lr: float, decay: float) -> None:
        rule, indices = self.rule, range(len(self.params))
        clock = Clock(torch.tensor(count), torch.tensor(num_steps))
        ones = torch.ones(len(grads))
        terms = apply.Terms(lr * ones, decay * rule.decay_scale * ones, ones)
        means: list[dict[str, Tensor]] = [{} for _ in indices]
        factored = [i for i in indices if self.layouts[i].factored is not None and self.family.factored]
        if factored:
            dummies = [self.accs[i] for i in factored]
            for acc in dummies:
                acc.update({f"{name}_scale": torch.ones_like(acc[f"{name}s"]) for name in ("row", "col")})
            group = [self.describe(i, grads[i]) for i in factored]
            views = lines.launch(group, apply.Terms(*(x[:1] for x in terms)), self.family)
            for i, pair in zip(factored, views, strict=True):
                means[i] = {f"{name}s": mean[None] for name, mean in zip(self.name_lines(i), pair, strict=True)}
        own: list[dict[str, Tensor]] = [{} for _ in indices]
        if rule.row_keys:
            for i in indices:
                e = Elements(grads[i].reshape(self.layouts[i].shape), self.params[i], self.accs[i], self.layouts[i])
                for key, (value, axes) in rule.measure(e).sums.items():
                    means[i].setdefault(key, value / count_elements(axes, self.layouts[i]))
            rows = {key: torch.stack([acc[key] for acc in self.accs]) for key in rule.row_keys}
            lifted = [{key: value[None] for key, value in mean.items()} for mean in means]
            rows, shared = rule.fold_tensors(rows, lifted, self.layouts, loss[None], clock.map(lambda x: x[None]))
            for i in indices:
                self.accs[i].update({key: value[i] for key, value in rows.items()})
                own[i] = {key: value[i] for key, value in shared.items()}
        for i in factored:
            acc, fields, _ = rule.fold_lines(means[i], self.accs[i], self.layouts[i])
            self.accs[i].update({**acc, **fields})

        group = [self.describe(i, grads[i]) for i in indices]
        parts = [features.make_segments(t, BLOCK) for t in group]
        segments = Segments([part for own in parts for part in own], features.by_tiles(BLOCK, STEPS))
        counts = torch.tensor([len(part) for part in parts])
        live = torch.ones(segments.num_segments, dtype=torch.bool)
        every = apply.Terms(*(x.repeat_interleave(counts) for x in terms))
        decays = torch.cat([d.flatten() for d in rule.decays()]) if self.family.factored else rule.decays
        decays = nn.functional.pad(decays, (0, self.family.momenta + 4 - len(decays)))[None]
        sums = accumulate.launch_segments(segments, decays, every, live, self.family, tile=(BLOCK, STEPS))

        folded = [self.fold(i, x, clock, own[i]) for i, x in enumerate(sums.split(counts.tolist()))]
        weights = MLPWeights(*(torch.cat(rows).contiguous() for rows in zip(*(w for w, _ in folded), strict=True)))
        steps = [torch.empty_like(p) for p in self.params]
        if rule.has("finish"):
            parts = [features.make_segments(t, BLOCK, step) for t, step in zip(group, steps, strict=True)]
            segments = Segments([part for own in parts for part in own], features.by_tiles(BLOCK, STEPS))
        mlp.launch_segments(
            segments, weights, every, live, self.family, self.shape, self.plan, delta=rule.has("finish")
        )
        if rule.has("finish"):
            for i, p in enumerate(self.params):
                delta, factor = rule.finish(steps[i], folded[i][1], self.layouts[i])
                p.copy_(p - lr * decay * rule.decay_scale * p + lr * delta * factor)

    def fold(self, i: int, sums: Tensor, clock: Clock, own: dict[str, Tensor]) -> tuple[MLPWeights, Any]:
        """The weights `[groups, ...]` that the rule's `fold` makes of one parameter's sums `[groups, S]`."""
        rule, layout, acc = self.rule, self.layouts[i], self.accs[i]
        axes = rule.norm_axes(layout) if self.family.factored else layout.axes
        kept = [1 if axis in axes else layout.shape[axis] for axis in layout.axes]
        squares = (sums / count_elements(axes, layout)).T.reshape(-1, *kept)
        elements, at = rule.slots(layout)[0], self.family.num_features
        used = sum(len(range(rule.widths[0])[part]) for part in elements)
        means = {"squares": squares[:used], "squares 0": squares[at:], "squares 1": squares[at:]}
        if layout.factored is not None or not self.family.factored:
            means = {"squares": means["squares"]}
        _, fields, terms = rule.fold(means, acc, layout, clock, own)
        (first, bias), *rest = terms.layers
        pieces = [first, *terms.lines]
        scales = [fields.get(key) for key in ("scale", "scale 0", "scale 1")]
        groups = len(sums)
        for j, piece in enumerate(pieces):
            scale = scales[j]
            each = piece.expand(groups, *piece.shape)
            pieces[j] = each if scale is None else each * scale.reshape(len(scale), -1).T[:, None]
        missing = at - pieces[0].shape[-1]
        pieces[0] = nn.functional.pad(pieces[0], (0, missing))
        if layout.factored is not None and self.name_lines(i) == ("col", "row"):
            pieces[1:] = pieces[:0:-1]
        whole = torch.cat(pieces, -1)
        whole = nn.functional.pad(whole, (0, self.family.num_inputs - whole.shape[-1]))
        flat = torch.cat([x.flatten() for layer in rest for x in layer])
        gain = terms.gain.reshape(-1)[:1].expand(groups)
        return MLPWeights(whole, bias.expand(groups, -1), flat.expand(groups, -1), gain), terms


CONFIGS: dict[str, dict[str, Any]] = {
    "small_fc": {"hidden": 16},  # on tensor cores
    "celo": {"hidden": 2, "width": 2},
    "mlp": {"hidden": 3},
    "celo2_base": {"hidden": 3},
    "velo": {"hidden": 1, "width": 2, "bank": 2},
}
LR = {"small_fc": 100.0, "celo": 1000.0, "mlp": 100.0, "celo2_base": 100.0, "velo": 100.0}  # steps of about 0.1


@pytest.mark.parametrize("name", list(CONFIGS))
def test_passes_between_the_rules_folds_make_its_steps(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rule: Rule = RULES[name](**CONFIGS[name])
    with torch.no_grad():
        for weight in rule.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    shapes = [(), (5,), (3, 20), (20, 3), (4, 3, 2, 2)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    scales = [torch.randn(shape, generator=generator).exp() for shape in shapes]
    want = [nn.Parameter(p.clone()) for p in start]
    got = [p.clone() for p in start]
    lr, decay, num_steps = LR[name], 1e-3, 20
    optimizer = LearnedOptimizer(want, rule, lr=lr, weight_decay=decay, num_steps=num_steps, backend="torch")
    grouped = Grouped(optimizer.rule, got)
    for count in range(3):
        loss = torch.rand((), generator=generator)
        grads = [torch.randn(s.shape, generator=generator) * s for s in scales]
        for p, g in zip(want, grads, strict=True):
            p.grad = g
        optimizer.step(loss=loss)
        with torch.no_grad():
            grouped.step(grads, count, loss, num_steps, lr, decay)
    for a, b, p in zip(got, want, start, strict=True):
        assert (b - p).abs().max() > 1e-2
        assert_close(a - p, b.detach() - p, TOLERANCE)


# --- compilation ---


@cache
def compile_all(capability: int) -> str:
    code = f"""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lopt_kernels import accumulate, lines, mlp
from lopt_kernels.features import WIDE, Family
from lopt_kernels.mlp import Shape, choose_plan
celo, wide = Family(clips=True), 1 << WIDE
for name, source in {{
    "lines": lines.compile_source(torch.bfloat16),
    "accumulate": accumulate.compile_source(torch.float32, kinds=wide),
    "fma": mlp.compile_source(torch.float32, celo, Shape(2), kinds=wide),
    "dot": mlp.compile_source(torch.float32, shape=Shape(32), plan=choose_plan(Shape(32), "tf32"), kinds=wide),
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


@pytest.mark.parametrize("capability", CAPABILITIES)
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
    new = accumulate.reference(t, draw_decays(family), apply.sample_terms(DEVICE), family)
    assert isinstance(new, Accumulated)
    assert all(torch.equal(a, b) for a, b in zip(before, [x for x in t if isinstance(x, Tensor)], strict=True))
