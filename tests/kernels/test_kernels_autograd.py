"""Differentiable kernels: values and gradients are the reference's, of first order (conftest.py: the interpreter)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lopt_kernels
import pytest
import torch
from lopt_kernels import DIFFERENTIABLE_OPS, DifferentiableOp
from lopt_kernels.differentiable import autograd
from lopt_kernels.differentiable import lstm as lstm_autograd
from lopt_kernels.differentiable import mlp as mlp_autograd
from lopt_kernels.feature_mlp.tiling import Shape
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_capability = pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
TOLERANCE = 1e-5  # order of summation
GUARD = 1024  # numbers on each side of a guarded tensor

LSTM, MLP = DIFFERENTIABLE_OPS["lstm"], DIFFERENTIABLE_OPS["mlp"]
SMALL: dict[str, dict[str, Any]] = {"lstm": {"hidden": 5}, "mlp": {"num_features": 5, "shape": Shape(7, 2)}}
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in DIFFERENTIABLE_OPS.items()])


def draw(op: DifferentiableOp, slots: int, count: int, **sizes: Any) -> Any:
    generator = torch.Generator().manual_seed(slots + count)
    return op.sample(slots, count, generator, torch.float32, DEVICE, **(sizes or SMALL[op.name]))


def block_of(op: DifferentiableOp) -> int:
    """Coordinates per program for what `draw` draws."""
    return op.block if op is LSTM else mlp_autograd.BLOCKS[16]


def weigh(results: list[Tensor]) -> Tensor:
    """A loss with gradients of very different scale."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), device=DEVICE)
    for t in results:
        weight = torch.randn(t.shape, generator=generator) * 10 ** torch.randn(*t.shape[:-1], 1, generator=generator)
        total = total + (t * weight.to(t)).sum()
    return total


def differentiate(function: Callable[..., Any], arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a function and gradients of its arguments."""
    own = tree_map(lambda t: t.detach().requires_grad_(), arguments)
    results = tree_leaves(function(*own))
    return results, list(torch.autograd.grad(weigh(results), tree_leaves(own)))


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Same shapes and dtypes; each matrix, of one slot or of all, is within `tolerance` of its own norm."""
    for left, right in zip(got, want, strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        a, b = (t.detach().double() for t in (left, right))
        start = -2 if b.ndim > 1 and b.shape[-2:].numel() > 1 else 0  # one number may cancel: the tensor's norm
        error, norm = (t.flatten(start).norm(dim=-1) for t in (a - b, b))
        assert (error <= tolerance * norm).all()


def watch_allocations(monkeypatch: pytest.MonkeyPatch, action: Callable[[Tensor], Tensor]) -> None:
    """Until `monkeypatch.undo()` every tensor that a launch is given to write to goes through `action`."""

    def replace(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            return made if kwargs else action(made)  # with a device: the interpreter's own

        monkeypatch.setattr(owner, name, run, raising=False)

    for owner, name in ((torch, "empty_like"), (torch, "zeros_like"), (Tensor, "new_empty")):
        replace(owner, name)


def assert_gradients_equal(op: DifferentiableOp, arguments: Any) -> None:
    """Results and gradients of the kernels are those of the reference."""
    got, want = differentiate(op.run, arguments), differentiate(op.reference, arguments)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])


# --- every op ---


def test_ops_are_registered_under_their_own_names() -> None:
    assert all(op.name == name for name, op in DIFFERENTIABLE_OPS.items())


@each_op
@pytest.mark.parametrize(("blocks", "extra"), [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)])
def test_gradients_equal_the_references_around_block_boundaries(op: DifferentiableOp, blocks: int, extra: int) -> None:
    assert_gradients_equal(op, draw(op, 2, blocks * block_of(op) + extra))


@pytest.mark.parametrize(("features", "hidden"), [(1, 1), (2, 17), (20, 20)])
@pytest.mark.parametrize("per_slot", [False, True])
def test_lstm_gradients_equal_the_references_at_every_padding(features: int, hidden: int, per_slot: bool) -> None:
    assert_gradients_equal(LSTM, draw(LSTM, 2, 3, num_features=features, hidden=hidden, per_slot=per_slot))


@pytest.mark.parametrize("shape", [Shape(1), Shape(16, 1, 1), Shape(17, 3), Shape(32, 2), Shape(40, 2, 4)])
@pytest.mark.parametrize(("per_slot", "spread"), [((False, True), False), ((True, False), True)])
def test_mlp_gradients_equal_the_references_at_every_padding(
    shape: Shape, per_slot: tuple[bool, bool], spread: bool
) -> None:
    features = {1: 1, 16: 16, 17: 33, 32: 5, 40: 18}[shape.hidden]
    assert_gradients_equal(MLP, draw(MLP, 3, 3, num_features=features, shape=shape, per_slot=per_slot, spread=spread))


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 3, 16, 32])
@pytest.mark.parametrize("hidden", [1, 8, 16, 20, 31, 32])
@pytest.mark.parametrize("count", [1, 17, 40])
def test_lstm_gradients_equal_the_references_over_many_shapes(features: int, hidden: int, count: int) -> None:
    for per_slot in (False, True):
        assert_gradients_equal(LSTM, draw(LSTM, 3, count, num_features=features, hidden=hidden, per_slot=per_slot))


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 16, 30, 128])
@pytest.mark.parametrize("shape", [Shape(2, 1), Shape(8, 3, 3), Shape(64, 2), Shape(100, 1), Shape(128, 3)])
@pytest.mark.parametrize("count", [1, 31, 65])
def test_mlp_gradients_equal_the_references_over_many_shapes(features: int, shape: Shape, count: int) -> None:
    for per_slot in ((False, False), (True, True)):
        assert_gradients_equal(MLP, draw(MLP, 3, count, num_features=features, shape=shape, per_slot=per_slot))


@each_op
@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_any_leading_dimensions_are_slots(op: DifferentiableOp, batch: tuple[int, ...]) -> None:
    slots = 4 if batch else 1
    arguments: Any = draw(op, slots, 3, **SMALL[op.name], per_slot=False if op is LSTM else (True, False))

    def fold(t: Tensor) -> Tensor:
        return t.reshape(*batch, *t.shape[1:]) if t.ndim == 3 else t

    assert_gradients_equal(op, tree_map(fold, arguments))


@each_op
def test_weights_may_be_shared_in_part_and_inputs_be_views(op: DifferentiableOp) -> None:
    per_slot: Any = True if op is LSTM else (True, True)
    x, middle, *weights = draw(op, 2, 3, **SMALL[op.name], per_slot=per_slot)
    wide = torch.stack([x, -x], -1)
    if op is LSTM:
        weights[0] = weights[0]._replace(w_ih1=weights[0].w_ih1[0], b2=weights[0].b2[:1])
        middle = tuple(s.mT.contiguous().mT for s in middle)
    else:
        first, rest = weights
        weights = [first, [(rest[0][0][1], rest[0][1]), *rest[1:]]]
        middle = middle.mT.contiguous().mT
    arguments = (wide[..., 0], middle, *weights)
    assert_gradients_equal(op, arguments)


@each_op
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_of_results_may_be_views(op: DifferentiableOp, transpose: bool) -> None:
    def run_transposed(run: Callable[..., Any], own: Any) -> tuple[Tensor, ...]:
        results = tree_leaves(run(*own))
        loss = sum((r.mT * torch.arange(r.shape[-2], device=DEVICE) if transpose else r).sum() for r in results)
        return torch.autograd.grad(loss, tree_leaves(own))

    own = tree_map(lambda t: t.detach().requires_grad_(), draw(op, 2, 5))
    got, want = (run_transposed(run, own) for run in (op.run, op.reference))
    assert_close(list(got), list(want))


@each_op
def test_gradients_are_the_same_bits_in_every_run(op: DifferentiableOp) -> None:
    arguments = draw(op, 3, 2 * block_of(op) + 1)
    first, second = (differentiate(op.run, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@each_op
def test_kernels_stay_inside_their_tensors(op: DifferentiableOp, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = draw(op, 2, block_of(op) + 1)
    want = differentiate(op.reference, arguments)
    buffers: list[tuple[Tensor, int]] = []

    def surround(tensor: Tensor, fill: float) -> Tensor:
        buffer = torch.full((tensor.numel() + 2 * GUARD,), fill, device=DEVICE)
        view = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        if fill == 7.0:
            buffers.append((buffer, tensor.numel()))
        return view.copy_(tensor)

    guarded = tree_map(lambda t: surround(t, torch.nan), arguments)  # what is read outside would spread
    watch_allocations(monkeypatch, lambda t: surround(t, 7.0))
    got = differentiate(op.run, guarded)
    monkeypatch.undo()
    assert_close(got[0] + got[1], want[0] + want[1])
    assert len(buffers) > 6
    assert all(b[:GUARD].eq(7).all() and b[GUARD + n :].eq(7).all() for b, n in buffers)


@each_op
def test_forward_pass_keeps_nothing_but_inputs_and_results(op: DifferentiableOp) -> None:
    per_slot: Any = True if op is LSTM else (True, True)
    arguments = draw(op, 2, 5, **SMALL[op.name], per_slot=per_slot)
    own = tree_map(Tensor.requires_grad_, arguments)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = tree_leaves(op.run(*own))
    known = {t.untyped_storage().data_ptr() for t in [*tree_leaves(own), *results]}
    new = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert len(kept) > 3
    assert all(t.ndim == 2 for t in new)  # the MLP's later layers, one behind the other: no tensor of coordinates


@each_op
def test_gradients_that_nobody_needs_are_not_computed(op: DifferentiableOp, monkeypatch: pytest.MonkeyPatch) -> None:
    x, *others = draw(op, 2, 5)
    sizes: list[tuple[int, ...]] = []
    x.requires_grad_()
    loss = tree_leaves(op.run(x, *others))[0].square().sum()
    watch_allocations(monkeypatch, lambda t: (sizes.append(tuple(t.shape)), t)[1])
    (gradient,) = torch.autograd.grad(loss, x)
    monkeypatch.undo()
    assert sizes == [tuple(gradient.shape)]


@each_op
def test_weights_alone_need_no_gradients_of_inputs(op: DifferentiableOp) -> None:
    x, middle, *weights = draw(op, 2, 5)
    want = differentiate(op.reference, (x, middle, *weights))[1][-len(tree_leaves(weights)) :]
    own = tree_map(lambda t: t.detach().requires_grad_(), weights)
    got = torch.autograd.grad(weigh(tree_leaves(op.run(x, middle, *own))), tree_leaves(own))
    assert_close(list(got), want)


@each_op
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 0 * inf, in the interpreter's numpy
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_number_stays_in_its_coordinate_and_slot(op: DifferentiableOp, value: float) -> None:
    per_slot: Any = True if op is LSTM else (True, True)
    x, *others = draw(op, 3, 5, **SMALL[op.name], per_slot=per_slot)
    clean = differentiate(op.run, (x, *others))
    bad = x.clone()
    bad[1, 0, 3] = value
    got, want = differentiate(op.run, (bad, *others)), differentiate(op.reference, (bad, *others))
    of_coordinates = len(got[0]) + len(tree_leaves((x, others[0])))
    for i, (now, before, reference) in enumerate(
        zip(got[0] + got[1], clean[0] + clean[1], want[0] + want[1], strict=True)
    ):
        assert torch.equal(now[[0, 2]], before[[0, 2]])
        assert torch.equal(now.isfinite(), reference.isfinite())
        assert_close([now.nan_to_num(0, 0, 0)], [reference.nan_to_num(0, 0, 0)])
        if i < of_coordinates:
            columns = [0, 1, 2, 4]
            assert torch.equal(now[1][..., columns], before[1][..., columns])


@each_op
def test_second_derivative_is_refused_and_says_what_to_do(op: DifferentiableOp) -> None:
    own: Any = tree_map(lambda t: t.detach().requires_grad_(), draw(op, 1, 3))
    result = tree_leaves(op.run(*own))[0]
    (gradient,) = torch.autograd.grad(result.square().sum(), own[0], create_graph=True)
    advice = r"lopt_kernels\.differentiable\.autograd\.use_references"
    with pytest.raises(RuntimeError, match=rf"{op.name} kernel: .*first order.*{advice}"):
        gradient.sum().backward()


@each_op
def test_bytes_moved_counts_inputs_and_results_of_the_forward_pass(op: DifferentiableOp) -> None:
    x, middle, *weights = draw(op, 3, 5)
    tensors = [x, *tree_leaves(middle), *tree_leaves(op.run(x, middle, *weights))]
    forward, backward = op.bytes_moved(3, 5, **{"num_features": 2} | SMALL[op.name])
    assert forward == sum(4 * t.numel() for t in tensors)
    assert backward > 2 * forward - 4 * 3 * 5 * 8


# --- one op ---


def test_low_precision_state_is_the_references_up_to_its_rounding() -> None:
    x, state, weights = draw(LSTM, 2, 5)
    arguments = (x, tuple(s.bfloat16() for s in state), weights)
    got, want = differentiate(LSTM.run, arguments), differentiate(LSTM.reference, arguments)
    assert_close(got[0] + got[1], want[0] + want[1], 2e-2)


@pytest.mark.parametrize("used", [(0,), (1,), (4,)])
def test_lstm_results_that_nobody_used_count_as_zero(used: tuple[int, ...]) -> None:
    arguments = draw(LSTM, 2, 3)

    def pick(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: [tree_leaves(run(*a))[i] for i in used]

    own = [tree_map(lambda t: t.detach().requires_grad_(), arguments) for _ in range(2)]
    got, want = (
        torch.autograd.grad(weigh(pick(run)(*a)), tree_leaves(a), allow_unused=True, materialize_grads=True)
        for run, a in zip((LSTM.run, LSTM.reference), own, strict=True)
    )
    assert_close(list(got), list(want))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 0 * inf, in the interpreter's numpy
def test_mlp_units_that_are_off_pass_nothing_on_be_it_infinite() -> None:
    x, base, first, rest = draw(MLP, 2, 3)
    x[0, 0, 1] = torch.inf  # to units that are off: also the rows that only pad the layer have to be
    first[..., 0] = -1.0
    own = [t.detach().requires_grad_() for t in (x, base)]
    want, got = (run(*own, first, rest) for run in (MLP.reference, MLP.run))
    assert want.isfinite().all()
    assert_close([got], [want])
    slope = torch.zeros_like(want)
    slope[0, :, 1], slope[1] = torch.inf, 1.0
    for left, right in zip(*(torch.autograd.grad(out, own, slope) for out in (got, want)), strict=True):
        assert right.isfinite().all()
        assert_close([left], [right])


@pytest.mark.parametrize(
    ("buffer", "per_slot", "spread"),
    [
        (1, (False, False), True),
        (1, (True, True), False),
        (40_000, (False, False), False),
        (40_000, (True, True), True),
    ],
)
def test_mlp_backward_pass_keeps_to_its_buffer(
    buffer: int, per_slot: tuple[bool, bool], spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(17, 2)
    count = 2 * mlp_autograd.BLOCKS[32] + 3
    arguments = draw(MLP, 3, count, num_features=5, shape=shape, per_slot=per_slot, spread=spread)
    want = differentiate(MLP.reference, arguments)
    monkeypatch.setattr(mlp_autograd, "BUFFER", buffer)
    taken: list[int] = []
    own = tree_map(Tensor.requires_grad_, arguments)
    loss = weigh([MLP.run(*own)])
    watch_allocations(monkeypatch, lambda t: (taken.append(4 * t.numel()), t)[1])
    got = torch.autograd.grad(loss, tree_leaves(own))
    monkeypatch.undo()
    assert_close(list(got), want[1])
    taken = taken[4:]  # behind the results
    each = 4 * shape.hidden * (3 + spread)  # bytes per coordinate
    assert len(taken) > 3
    assert sum(taken) == each * 3 * count
    parts = 3 + (1 if spread else 0) - 1
    largest = max(sum(taken[i : i + parts]) for i in range(0, len(taken), parts))
    assert largest <= max(buffer, each * mlp_autograd.BLOCKS[32])


def change(op: DifferentiableOp, **changes: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of which some are not what they should be."""
    x, middle, *weights = draw(op, 2, 3)
    x = changes["x"](x) if "x" in changes else x
    if op is LSTM:
        middle = (changes["h1"](middle[0]) if "h1" in changes else middle[0], *middle[1:])
        weights = [weights[0]._replace(b2=changes["b2"](weights[0].b2)) if "b2" in changes else weights[0]]
    elif "base" in changes:
        middle = changes["base"](middle)
    elif "first" in changes:
        weights[0] = changes["first"](weights[0])
    return x, middle, *weights


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        (LSTM, {"x": lambda x: x[0, 0]}, r"x must be \[\*batch, F, N\]"),
        (LSTM, {"x": lambda x: x.double()}, "x must be torch.float32, got torch.float64"),
        (LSTM, {"x": lambda x: x.repeat(1, 17, 1)}, "F and H must be 1 to 32, got F=34, H=5. Use the reference"),
        (LSTM, {"h1": lambda h: h[:1].repeat(3, 1, 1)}, r"h1 must have shape \[..., 2, 5, 3\], got \[3, 5, 3\]"),
        (LSTM, {"h1": lambda h: h.half()}, "h1 is torch.float16"),
        (LSTM, {"b2": lambda b: b[:-1]}, r"b2 must have shape \[..., 20\], got \[19\]"),
        (LSTM, {"b2": lambda b: b.repeat(3, 1)}, r"leading dimensions of b2 .* \[2\]; its shape is \[3, 20\]"),
        (MLP, {"x": lambda x: x.bfloat16()}, "x must be torch.float32, got torch.bfloat16"),
        (MLP, {"base": lambda b: b[..., :2]}, r"base must have shape \[..., 7, 3\], got \[2, 7, 2\]"),
        (MLP, {"first": lambda w: w[..., :4]}, r"first must have shape \[..., 7, 5\]"),
        (MLP, {"first": lambda w: w.repeat(1, 20, 1)}, "F and H must be 1 to 128 and 128"),
    ],
)
def test_bad_arguments_are_named(op: DifferentiableOp, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.run(*change(op, **changes))


# --- who uses them ---


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """From its first call on kernels run on any device; it returns the names of those that ran."""
    ran: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (ran.append(name), original(*args))[1])

    def start() -> list[str]:
        if not ran:
            monkeypatch.setattr(autograd, "can_launch", lambda device: True)
            watch(lstm_autograd, "run_lstm")
            watch(mlp_autograd, "run_mlp")
        return ran

    return start


CASES = [
    ("lstm", {"hidden": 4}, {}),
    ("lstm", {"hidden": 4}, {"order": 2}),
    ("lstm", {"hidden": 4}, {"checkpoint": "update"}),
    ("rnnprop", {"hidden": 4}, {}),
    ("rnnprop", {"hidden": 4}, {"order": 2}),
    ("small_fc", {"hidden": 4}, {}),
    ("small_fc", {"hidden": 20, "hidden_layers": 2}, {"order": 2}),
    ("small_fc", {"hidden": 4}, {"checkpoint": "update"}),
    pytest.param("velo", {"width": 8, "bank": 3}, {}, marks=pytest.mark.slow),
    pytest.param("celo2", {}, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_truncated_backpropagation_gives_the_same_meta_gradient(
    name: str, config: dict[str, Any], options: dict[str, Any], on_kernels: Callable[[], list[str]]
) -> None:
    rule, slots = RULES[name](**config), 2
    steps, family = (3, TASKS["quadratic"](dim=5)) if rule.elementwise else (2, TASKS["mlp"](width=2, batch_size=4))
    estimator = ESTIMATORS["truncated"](num_steps=steps, **options)
    loop = InnerLoop(rule, family, 0, lambda seeds: torch.full_like(seeds, steps + 1))
    start = estimator.start(loop, torch.arange(slots))._replace(horizon=torch.full((slots,), steps + 1))
    want = estimator.estimate(loop, start)
    ran = on_kernels()
    got = estimator.estimate(loop, start)
    times = 2 if "checkpoint" in options else 1
    tensors = 1 if rule.elementwise else 2 if name == "celo2" else 4  # celo2 moves vectors by another rule
    assert len(ran) == times * steps * tensors
    flat = [torch.cat([g.flatten() for g in e.gradient.values()]) for e in (got, want)]
    assert (flat[0] - flat[1]).norm() <= TOLERANCE * flat[1].norm()
    torch.testing.assert_close(got.carry.params, want.carry.params, rtol=1e-5, atol=1e-7)


class DoubleQuadratic(TASKS["quadratic"]):  # type: ignore[misc, name-defined]
    """The same problems in float64."""

    def init(self, task: Any, generator: torch.Generator) -> Any:
        return {key: x.double() for key, x in super().init(task, generator).items()}

    def batch(self, tasks: Any, seeds: Tensor, split: str = "train") -> Any:
        return {key: x.double() for key, x in super().batch(tasks, seeds, split).items()}


@pytest.mark.parametrize("name", ["lstm", "small_fc"])
def test_every_slot_may_have_meta_weights_of_its_own(name: str, on_kernels: Callable[[], list[str]]) -> None:
    slots, steps = 3, 2
    drawn = {}

    def differentiate_run(family: Any, dtype: torch.dtype) -> list[Tensor]:
        rule, generator = RULES[name](hidden=4).to(dtype), torch.Generator().manual_seed(0)
        for key, w in rule.meta_weights().items():
            drawn.setdefault(key, w.detach() + 0.1 * torch.randn(slots, *w.shape, generator=generator))
        weights = {key: w.to(dtype).requires_grad_() for key, w in drawn.items()}
        loop = InnerLoop(rule, family, 0, lambda seeds: torch.full_like(seeds, 9), meta_weights=weights)
        losses = loop.unroll(loop.start(torch.arange(slots)), steps).losses
        gradients = torch.autograd.grad(losses.mean(), list(weights.values()), allow_unused=True)
        return [g for g in gradients if g is not None]

    family = TASKS["quadratic"](dim=5)
    formula = differentiate_run(family, torch.float32)
    exact = differentiate_run(DoubleQuadratic(dim=5), torch.float64)
    ran = on_kernels()
    kernels = differentiate_run(family, torch.float32)
    assert ran

    def find_error(found: list[Tensor]) -> float:
        return max(float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True))

    # Gradients of two steps cancel (small_fc's formula is 2e-4 of them away from float64), and which of the two is the
    # luckier one depends on the processor: the kernels may be as far from float64 as the formula, times a small factor.
    assert find_error(formula) <= 1e-3  # else nothing would be compared
    assert find_error(kernels) <= max(TOLERANCE, 2 * find_error(formula))


def test_references_run_where_they_are_asked_for_and_can_be_differentiated_twice(
    on_kernels: Callable[[], list[str]],
) -> None:
    rule = RULES["lstm"](hidden=2)
    params = {"x": torch.ones(3, device=DEVICE)}
    ran = on_kernels()
    with autograd.use_references():
        new, _ = rule.to(DEVICE)({"x": params["x"]}, params, rule.init_state(params))
        assert not ran
        weights = list(rule.meta_weights().values())
        first = torch.autograd.grad(new["x"].square().sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    assert all(g.isfinite().all() for g in second)
    rule({"x": params["x"]}, params, rule.init_state(params))
    assert ran == ["run_lstm"]


def test_kernels_run_for_ordinary_autograd_in_float32_only(on_kernels: Callable[[], list[str]]) -> None:
    rule = RULES["small_fc"](hidden=2)
    params = {"x": torch.ones(3)}
    grads = {"x": torch.tensor([1.0, -2.0, 3.0])}
    assert not autograd.can_launch(torch.device("cpu"))
    ran = on_kernels()
    with torch.no_grad():
        rule(grads, params, rule.init_state(params))
    double = RULES["small_fc"](hidden=2).double()
    doubles = [{"x": t["x"].double()} for t in (grads, params)]
    double(*doubles, double.init_state(doubles[1]))
    wide = RULES["small_fc"](hidden=130)
    wide(grads, params, wide.init_state(params))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        new, _ = functional_call(rule, weights, (grads, params, rule.init_state(params)))
        return new["x"].sum()

    torch.func.grad(loss)(dict(rule.meta_weights()))
    assert not ran
    rule(grads, params, rule.init_state(params))
    assert ran == ["run_mlp"]


# --- compilation ---


@cache
def compile_all(capability: int, wide: bool) -> dict[str, tuple[int, int, bool, bool]]:
    """What each kernel takes: registers, bytes spilled; whether tensor cores are used, and offsets are 64-bit."""
    small = """
sources = {"lstm backward": lstm_autograd.compile_sources(torch.float32)["backward"]}
sources |= {f"mlp {k}": s for k, s in mlp_autograd.compile_sources(shape=Shape(32, 2), num_features=18).items()}
"""
    large = """
sources = {f"lstm {k} {F} {H} {own}": s for F, H in ((2, 20), (20, 20), (32, 32)) for own in (False, True)
           for k, s in lstm_autograd.compile_sources(torch.float32, F, H, own).items()}
sources |= {f"lstm bf16 {k}": s for k, s in lstm_autograd.compile_sources(torch.bfloat16).items()}
sources |= {f"mlp {k} {F} {H} {L}": s for F, H, L in ((16, 4, 1), (18, 8, 2), (30, 32, 1), (30, 32, 3), (30, 64, 2))
            for k, s in mlp_autograd.compile_sources(num_features=F, shape=Shape(H, L)).items()}
"""
    code = f"""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lopt_kernels import lstm_autograd, mlp_autograd
from lopt_kernels.launching.figures import compile_figures
from lopt_kernels.feature_mlp.tiling import Shape
{large if wide else small}
for name, s in sources.items():
    figures = compile_figures(s, {capability})
    target = GPUTarget("cuda", {capability}, 32)
    kernel = triton.compile(ASTSource(s.kernel, s.signature, s.constexprs), target=target, options=s.options)
    products = [line for line in kernel.asm["ttir"].splitlines() if "arith.muli" in line]
    far = bool(products) and all("i64" in line for line in products)
    print(name, figures.registers, figures.spilled, "mma" in kernel.asm["ptx"], far, sep="|")
"""
    path = os.pathsep.join([str(Path(lopt_kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return {name: (int(r), int(s), mma == "True", far == "True") for name, r, s, mma, far in rows}


@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
@each_capability
def test_kernels_compile_without_spills_and_multiply_offsets_as_64_bit(capability: int, wide: bool) -> None:
    figures = compile_all(capability, wide)
    assert len(figures) == (31 if wide else 3)
    assert all(spilled <= (8 if "forward" in name else 0) for name, (_, spilled, _, _) in figures.items()), figures
    assert all(
        mma == ("bf16 forward" in name) for name, (_, _, mma, _) in figures.items()
    )  # would round a float32 product
    assert all(far for *_, far in figures.values())
