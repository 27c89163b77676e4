"""The kernels that step every coordinate alone: many tensors in one launch equal lopt's own rules, tensor by tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lopt_kernels
import pytest
import torch

pytest.importorskip("triton")

from lopt_kernels import OPS, Op
from lopt_kernels.launching.parameters import Items, Rates, make_items
from lopt_kernels.launching.random import draw_bits
from lopt_kernels.launching.segments import Segment, Segments, by_elements
from torch import Tensor

from lopt.core.random import fold_in
from lopt.optim.torch_backend.chunked import ChunkedTensor
from lopt.optim.update import ParameterUpdate
from lopt.rules import RULES as LOPT_RULES
from lopt.rules import Clock, Rule, step_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ELEMENTWISE = {name: op for name, op in OPS.items() if op.formula}
PACKAGES = Path(lopt_kernels.__file__).parents[1]
GUARD = 256  # numbers on each side of a guarded tensor
EXACT = 1e-5  # order of summation, in float32
TOLERANCE = {torch.float32: EXACT, torch.bfloat16: 2e-2}  # of the state; bfloat16: tf32 products, one rounding

each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in ELEMENTWISE.items()])
each_op_and_state = pytest.mark.parametrize(
    ("op", "dtype"),
    [
        pytest.param(op, dtype, id=f"{name}-{dtype}".replace("torch.", ""))
        for name, op in ELEMENTWISE.items()
        for dtype in op.state_dtypes
    ],
)
each_op_and_rule = pytest.mark.parametrize(
    ("op", "rule"),
    [pytest.param(op, rule, id=f"{name}-{rule}") for name, op in ELEMENTWISE.items() for rule in op.formula.rules],
)


class Group(NamedTuple):
    """Parameters in the middle of a run; the weights are a stack, slot `i % 2` for parameter `i`."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[tuple[Tensor, ...]]
    weights: Any
    rates: Rates
    live: Tensor
    steps: Tensor
    buffers: list[Tensor]

    def segments(self, op: Op) -> Segments:
        rows = zip(self.params, self.states, strict=True)
        made = [Segment((p, *s), (p.numel(),), i, i % 2) for i, (p, s) in enumerate(rows)]
        return Segments(made, by_elements(op.block))

    def items(self, seeds: Tensor | None = None) -> Items:
        return make_items(self.grads, self.rates, self.live, self.steps, seeds)

    def clone(self) -> Group:
        """The same numbers in other memory."""
        copies: list[Tensor] = []
        tensors = [[p, g, *s] for p, g, s in zip(self.params, self.grads, self.states, strict=True)]
        rows = [[_guard(t, copies) for t in row] for row in tensors]
        return self._replace(
            params=[r[0] for r in rows], grads=[r[1] for r in rows], states=[tuple(r[2:]) for r in rows], buffers=copies
        )

    def tensors(self, i: int) -> list[Tensor]:
        return [self.params[i], *self.states[i]]


def _guard(tensor: Tensor, buffers: list[Tensor]) -> Tensor:
    """A copy in the middle of a larger tensor full of NaN."""
    buffers.append(tensor.new_full((tensor.numel() + 2 * GUARD,), torch.nan))
    return buffers[-1][GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)


def draw_group(
    op: Op,
    sizes: list[int],
    dtype: torch.dtype = torch.float32,
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
) -> Group:
    """Parameters of these sizes with heterogeneous gradients, different rates and two sets of weights."""
    generator = torch.Generator().manual_seed(sum(sizes))
    drawn = [op.sample(size, generator, dtype, DEVICE) for size in sizes]
    other = op.sample(1, generator, dtype, DEVICE)["weights"]
    first = drawn[0]["weights"]
    count = torch.arange(len(sizes), device=DEVICE)
    shapes = [() if size == 1 else (size,) for size in sizes]
    group = Group(
        params=[d["p"].to(p_dtype).reshape(shape) for d, shape in zip(drawn, shapes, strict=True)],
        grads=[d["g"].to(g_dtype) for d in drawn],
        states=[d["state"] for d in drawn],
        weights=type(first)(*(torch.stack(pair) for pair in zip(first, other, strict=True))),
        rates=Rates(0.5 + 0.1 * count, 0.03 * (count % 3), 1.0 - 2.0 * (count % 2)),
        live=torch.ones(len(sizes), dtype=torch.bool, device=DEVICE),
        steps=7 * count,
        buffers=[],
    )
    return group.clone()


def run(op: Op, group: Group, seeds: Tensor | None = None, **options: Any) -> Group:
    """One launch over all of the group, in place."""
    assert op.launch_segments is not None
    op.launch_segments(group.segments(op), group.weights, group.items(seeds), **options)
    return group


def expect(op: Op, group: Group, i: int, **options: Any) -> tuple[Tensor, ...]:
    """The reference's new parameter and state of parameter `i`."""
    p, state = op.reference(
        group.params[i].reshape(-1),
        group.grads[i].reshape(-1),
        group.states[i],
        type(group.weights)(*(w[i % 2] for w in group.weights)),
        Rates(*(t[i : i + 1] for t in group.rates)),
        group.steps[i : i + 1].float(),
        **options,
    )
    return (p, *state)


def assert_close(got: Tensor, want: Tensor, old: Tensor, tolerance: float) -> None:
    """Of the same dtype, and as far from `old` up to `tolerance` of the movement and the rounding of the dtype."""
    assert got.dtype == want.dtype
    a, b, start = (t.double().reshape(-1) for t in (got, want, old))
    rounding = torch.finfo(got.dtype).eps * torch.linalg.vector_norm(b)  # to the neighbour: the interpreter cuts off
    assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b - start) + rounding


def assert_guards(group: Group) -> None:
    for buffer in group.buffers:
        assert torch.cat([buffer[:GUARD], buffer[-GUARD:]]).isnan().all()
        assert buffer.isnan().sum() == 2 * GUARD


# --- one launch over many tensors ---


@each_op_and_state
def test_one_launch_equals_the_reference_on_tensors_of_all_sizes(op: Op, dtype: torch.dtype) -> None:
    sizes = [1, 0, op.block - 1, 0, op.block + 1, op.block, 0]
    group = draw_group(op, sizes, dtype)
    old = group.clone()
    run(op, group)
    for i in range(len(sizes)):
        for got, want, start in zip(group.tensors(i), expect(op, old, i), old.tensors(i), strict=True):
            assert_close(got, want, start, TOLERANCE[dtype])
    assert_guards(group)
    again = run(op, old)
    for got, want in zip(
        again.params + [s for t in again.states for s in t],
        group.params + [s for t in group.states for s in t],
        strict=True,
    ):
        assert torch.equal(got, want)


@each_op
@pytest.mark.parametrize(
    ("p_dtype", "g_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_low_precision_parameters_are_rounded_once(op: Op, p_dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    group = draw_group(op, [5, op.block + 1], p_dtype=p_dtype, g_dtype=g_dtype)
    old = group.clone()
    run(op, group)
    for i in range(2):
        p, *state = expect(op, old, i)
        assert group.params[i].dtype == p_dtype
        unit = torch.finfo(p_dtype).eps * p.float().abs()  # the interpreter cuts bfloat16 off, a GPU rounds it
        assert ((group.params[i].float() - p.float()).abs() <= unit).all()
        if p_dtype == torch.float16 or DEVICE.type == "cuda":
            assert (group.params[i] != p).sum() <= 1  # a tie may fall to the other side
        for got, want, start in zip(group.states[i], state, old.states[i], strict=True):
            assert_close(got, want, start, EXACT)
    assert_guards(group)


@each_op
def test_dead_segment_is_not_written_and_a_rate_of_zero_only_moves_the_state(op: Op) -> None:
    group = draw_group(op, [op.block + 1, 9, 9])
    group.live[0], group.rates.lr[1] = False, 0.0
    group.grads[0].fill_(torch.nan)
    group.grads[1][0] = torch.nan  # 0 times it is not 0
    old = group.clone()
    run(op, group)
    assert all(torch.equal(a, b) for a, b in zip(group.tensors(0), old.tensors(0), strict=True))
    assert torch.equal(group.params[1], old.params[1])
    for got, want in zip(group.states[1], old.states[1], strict=True):
        assert not torch.equal(got[..., 1:], want[..., 1:])
    assert not any(torch.equal(a, b) for a, b in zip(group.tensors(2), old.tensors(2), strict=True))


@each_op
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * inf, in the interpreter's numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradient_stays_in_its_segment(op: Op, value: float) -> None:
    group = draw_group(op, [7, op.block, 7])
    clean = run(op, group.clone())
    group.grads[1].fill_(value)
    old = group.clone()
    run(op, group)
    for i in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(group.tensors(i), clean.tensors(i), strict=True))
    for got, want in zip(group.tensors(1), expect(op, old, 1), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    if torch.isnan(torch.tensor(value)):
        assert all(tensor.isnan().all() for tensor in group.states[1])


@each_op
def test_sanitized_gradient_counts_as_zero(op: Op) -> None:
    group = draw_group(op, [op.block + 1])
    clean = group.clone()
    group.grads[0][3:6] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    clean.grads[0][3:6] = 0.0
    run(op, group, sanitize=True)
    run(op, clean)
    assert all(torch.equal(a, b) for a, b in zip(group.tensors(0), clean.tensors(0), strict=True))


# --- rounding at random ---


@each_op
def test_bfloat16_parameters_are_rounded_by_lopts_random_bits(op: Op) -> None:
    group = draw_group(op, [op.block + 1, 40], p_dtype=torch.bfloat16)
    seeds = fold_in(torch.arange(2, device=DEVICE), group.steps)
    assert torch.equal(draw_bits(seeds[:1], 0, 50, 16)[0], (fold_in(seeds[0], torch.arange(50)) >> 48) & 0xFFFF)
    old, nearest = group.clone(), run(op, group.clone())
    run(op, group, seeds=seeds)
    assert not torch.equal(group.params[0], nearest.params[0])
    for i in range(2):
        want = expect(op, old, i, seeds=seeds[i : i + 1])[0]
        assert (group.params[i] != want).float().mean() <= 0.03  # the step's last bits may cross a threshold


# --- lopt's own rules ---


@each_op_and_rule
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_reference_equals_lopts_rule_under_its_own_apply(op: Op, rule: str, maximize: bool, tensor_rate: bool) -> None:
    check_reference(op, LOPT_RULES[rule](), maximize, tensor_rate)


def check_reference(op: Op, rule: Rule, maximize: bool, tensor_rate: bool) -> None:
    """The op's definition moves a matrix as the rule does in three steps of the optimizer."""
    formula, generator = op.formula, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in rule.named_parameters():  # an untrained output layer hardly moves anything
            if "w_out" in name:
                weight.mul_(10)
    p = torch.randn(6, 5, generator=generator)
    acc = rule.init_state({"": p}).accumulators[""]
    stepped = {key: value.clone() for key, value in acc.items()}
    moved, flat = p.clone(), p.reshape(-1).clone()
    state = tuple(acc[key].flatten(acc[key].ndim - 2).clone() for key in formula.keys)
    weights = formula.weights(*(getattr(rule, field).detach() for field in formula.weights._fields))
    lr, decay = 0.8, 0.1
    rates = Rates(torch.tensor([lr]), torch.tensor([decay]), torch.tensor([-0.5 if maximize else 0.5]))
    for step in range(3):
        g = torch.randn(6, 5, generator=generator) * 10 ** torch.arange(-4.0, 2)[:, None]
        before = moved.clone()
        apply = ParameterUpdate(torch.tensor(lr) if tensor_rate else lr, decay, maximize, unscale=torch.tensor(0.5))
        tensor = ChunkedTensor(rule, moved, g, stepped, apply)
        with torch.no_grad():
            step_tensors(rule, [tensor], None, Clock(torch.tensor([step]), None))
        flat, state = op.reference(flat, g.reshape(-1), state, weights, rates, torch.tensor([float(step)]))
        assert_close(flat, moved, before, EXACT)
        for key, value in zip(formula.keys, state, strict=True):
            torch.testing.assert_close(value.reshape(stepped[key].shape), stepped[key], rtol=EXACT, atol=1e-6)


# --- the table ---


def test_segments_of_one_parameter_share_its_numbers() -> None:
    op = OPS["adamw"]
    group = draw_group(op, [6])
    want = run(op, group.clone())
    tensors = group.tensors(0)
    halves = [Segment(tuple(t[part] for t in tensors), (3,)) for part in (slice(3), slice(3, 6))]
    grads = [group.grads[0]]
    assert op.launch_segments is not None
    for half, grad in zip(halves, (grads[0][:3], grads[0][3:]), strict=True):
        items = group.items()._replace(grads=torch.tensor([grad.data_ptr()], device=DEVICE), align=1)
        op.launch_segments(Segments([half], by_elements(op.block)), group.weights, items)
    assert all(torch.equal(a, b) for a, b in zip(tensors, want.tensors(0), strict=True))


def test_table_knows_what_is_aligned() -> None:
    x = torch.zeros(64)
    aligned = Segments([Segment((x,), (32, 3)), Segment((x[16:],), (48, 16))], by_elements(4))
    assert (aligned.align, aligned.multiples) == (16, (16, 1))
    assert Segments([Segment((x,), (32,)), Segment((x[1:],), (34,))], by_elements(4)).align == 4


Change = Callable[[list[Segment]], list[Segment]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "at least one segment"),
        (lambda s: [*s, Segment((torch.zeros(2).half(),), (2,))], "segment 1 has .*float16"),
        (lambda s: [*s, Segment((torch.zeros(2),), (2, 2))], "and 2"),
        (lambda s: [*s, Segment((torch.zeros(2, device="meta"),), (2,))], "on meta"),
        (lambda s: [Segment((torch.zeros(2),), (2**42,))], "more than a launch takes"),
    ],
)
def test_table_names_what_does_not_fit(change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments(change([Segment((torch.zeros(2),), (2,))]), by_elements(16))


@each_op
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g._replace(live=g.live.float()), "live must be contiguous torch.bool"),
        (lambda g: g._replace(steps=g.steps[:1]), r"steps must be contiguous torch.int64 \[2\]"),
        (lambda g: g._replace(rates=g.rates._replace(lr=g.rates.lr.double())), "lr must be contiguous torch.float32"),
        (lambda g: g._replace(weights=type(g.weights)(*(w[:1] for w in g.weights))), "slot 1, .* a stack of 1"),
        (lambda g: g._replace(weights=type(g.weights)(*(w.double() for w in g.weights))), "must be contiguous torch.f"),
        (lambda g: g._replace(states=[s[1:] for s in g.states]), "state tensors"),
        (lambda g: g._replace(params=[p.double() for p in g.params]), "must be a parameter"),
    ],
)
def test_launch_names_what_it_cannot_take(op: Op, change: Callable[[Group], Group], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(op, change(draw_group(op, [2, 2])))


# --- compilation ---

COMPILE_AND_PRINT = """
import torch
from lopt_kernels import OPS
from lopt_kernels.launching.figures import compile_figures
for name, dtypes in {what}.items():
    options = {options}
    for dtype in dtypes:
        for p_dtype, seeded in ((torch.float32, False), (torch.bfloat16, True))[{first}:]:
            for capability in (80, 90):
                source = OPS[name].compile_source(dtype, p_dtype=p_dtype, g_dtype=p_dtype, seeded=seeded, **options)
                print(name, dtype, p_dtype, capability, *compile_figures(source, capability))
"""


def compile_all(what: str, first: int, folder: Path, **options: Any) -> list[str]:
    """A line `op, dtype, parameter's dtype, capability, registers, spilled, shared, warps` for each, printed too."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(PACKAGES), env.get("PYTHONPATH")]))
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILE_AND_PRINT.format(what=what, first=first, options=options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print("op dtype parameter capability registers spilled shared warps", done.stdout, sep="\n")  # noqa: T201
    return done.stdout.splitlines()


def test_light_kernels_with_random_rounding_compile_without_spills(tmp_path: Path) -> None:
    light = [name for name, op in ELEMENTWISE.items() if op.formula.layers is None]
    lines = compile_all(f"{{name: [torch.float32] for name in {light}}}", 1, tmp_path)
    assert len(lines) == 2 * len(light)
    assert all(line.split()[5] == "0" for line in lines), lines


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    what = ", ".join(f"{name!r}: {list(op.state_dtypes)}" for name, op in ELEMENTWISE.items())
    lines = compile_all(f"{{{what}}}", 0, tmp_path)
    assert len(lines) == 4 * sum(len(op.state_dtypes) for op in ELEMENTWISE.values())
    assert all(line.split()[5] == "0" for line in lines), lines
    deep = [name for name, op in ELEMENTWISE.items() if op.formula.layers is not None]
    lines = compile_all(f"{{name: [torch.float32] for name in {deep}}}", 0, tmp_path, precision="tf32")
    assert len(lines) == 4 * len(deep)
    assert all(line.split()[5] == "0" for line in lines), lines
