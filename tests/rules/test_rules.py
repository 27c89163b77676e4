"""The contract: what every rule in RULES must do.

Where two ways of computing the same are compared, it is in float64: a step is much smaller than its parameter, and in
fp32 the parameter's rounding would hide it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from rule_cases import SizedMomenta, make_quick
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.meta.estimators.truncated import Truncated
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.optim.torch_backend import chunked
from lopt.rules import RULES, HandDesigned, Rule, State, files
from lopt.rules.building_blocks import features, last_loss
from lopt.rules.building_blocks.eigenbases import RIDGE
from lopt.rules.stages import PLACE
from lopt.tasks import Batch, Task, TaskFamily

SHAPES: dict[str, tuple[int, ...]] = (
    {"w": (3, 4), "tall": (5, 2), "square": (3, 3), "row": (1, 3), "column": (4, 1), "one": (1, 1)}
    | {"conv1": (3, 2, 4), "conv2": (4, 3, 2, 2), "conv3": (2, 3, 2, 1, 2), "depthwise": (4, 1, 3)}
    | {"b": (4,), "b1": (1,), "s": ()}
    | {"none": (0,), "no_rows": (0, 2), "no_inputs": (2, 0, 3), "embed": (4, 2)}
)
FEW_SHAPES: dict[str, tuple[int, ...]] = {"w": (3, 4), "conv": (2, 3, 2), "one": (1, 1), "b": (4,), "s": ()}
HORIZON = 50  # planned steps
SAME = 1e-10  # float64: the same formula in another order of operations, over a few steps; steps are 1e-5 and more


@pytest.fixture(params=sorted({*RULES, SizedMomenta.name}))
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rule:
    monkeypatch.setitem(RULES, SizedMomenta.name, SizedMomenta)
    return make_rule(request.param)


def make_rule(name: str) -> Rule:
    """A rule whose meta-weights are no round numbers: hyper-parameters lie in (0, 1), so they are scaled.

    Biases that start at 0 do not stay there: a tensor for which a layer is silent would be on the kink of relu.
    """
    rule = make_quick(name)
    generator = make_generator(7)
    with torch.no_grad():
        for weight in rule.parameters():
            weight *= 1 - 0.05 * torch.rand(weight.shape, generator=generator)
            if weight.ndim:
                weight += (weight == 0) * 0.02 * torch.randn(weight.shape, generator=generator)
    return rule


def draw(
    seed: int,
    *batch: int,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """Tensors whose rows differ in scale by powers of ten."""
    generator = make_generator(seed)
    result = {}
    for name, shape in shapes.items():
        x = torch.randn((*batch, *shape), generator=generator, dtype=dtype)
        scale = 10 ** (2 * torch.rand(x.shape[:-1], generator=generator, dtype=dtype) - 1)
        result[name] = x * (scale[..., None] if x.ndim else scale)
    return result


def draw_loss(seed: int, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, generator=make_generator(seed), dtype=dtype)


def run(
    rule: Callable[..., tuple[Params, State]], params: Params, state: State, steps: int, batch: tuple[int, ...] = ()
) -> tuple[Params, State]:
    """`steps` updates with gradients and losses that do not depend on the parameters."""
    shapes = {name: tuple(p.shape[len(batch) :]) for name, p in params.items()}
    dtype = next(iter(params.values())).dtype
    for step in range(steps):
        grads, loss = draw(100 + step, *batch, shapes=shapes, dtype=dtype), draw_loss(step, batch, dtype)
        params, state = rule(grads, params, state, loss, torch.full(batch, HORIZON))
    return params, state


def move(rule: Rule, params: Params, grads: list[Params]) -> Params:
    """How the rule moves the parameters."""
    new, state = params, rule.init_state(params)
    with torch.no_grad():
        for step, g in enumerate(grads):
            loss = draw_loss(step, dtype=next(iter(g.values())).dtype)
            new, state = rule.update(g, new, state, loss, torch.tensor(HORIZON))
    return {name: new[name] - p for name, p in params.items()}


def assert_trees_close(actual: object, expected: object, rtol: float, least: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest number of the leaf, or to `least` if that is larger."""
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            torch.testing.assert_close(a, b, rtol=0, atol=rtol * max(b.abs().max().item(), least))


def assert_trees_equal(actual: object, expected: object) -> None:
    assert_trees_close(actual, expected, 0.0)


# -- one update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_update_keeps_names_shapes_and_dtypes(rule: Rule, batch: tuple[int, ...]) -> None:
    params = draw(1, *batch)
    state = rule.init_state(params, len(batch))
    assert state.step.shape == batch
    assert state.step.dtype == torch.int64
    new, new_state = run(rule, params, state, 1, batch)
    described = tree_map(lambda x: (x.shape, x.dtype), (params, state))
    assert tree_map(lambda x: (x.shape, x.dtype), (new, new_state)) == described
    assert bool((new_state.step == 1).all())
    assert all(bool(x.isfinite().all()) for x in tree_leaves((new, new_state)))


def test_update_moves_parameters_of_every_shape(rule: Rule) -> None:
    params = draw(1)
    new, _ = run(rule, params, rule.init_state(params), 1)
    assert all(bool((new[name] != p).any()) for name, p in params.items() if p.numel())


def test_update_changes_none_of_its_arguments(rule: Rule) -> None:
    params = draw(1, 2)
    params, state = run(rule, params, rule.init_state(params, 1), 1, (2,))
    grads, loss, planned = draw(5, 2), torch.ones(2), torch.full((2,), HORIZON)
    arguments = tree_map(Tensor.detach, (grads, params, state, loss, planned))
    before = copy.deepcopy(arguments)
    versions = [x._version for x in tree_leaves(arguments)]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            rule.update(*arguments)
    assert_trees_equal(arguments, before)
    assert [x._version for x in tree_leaves(arguments)] == versions


def test_first_state_is_memory_of_its_own(rule: Rule) -> None:
    """LearnedOptimizer updates accumulators in place: they must not share memory, nor be called `step`."""
    params = draw(1)
    for name, acc in rule.init_state(params).accumulators.items():
        assert "step" not in acc
        assert all(a.is_contiguous() for a in acc.values())
        pointers = [x.data_ptr() for x in (*acc.values(), params[name]) if x.numel()]
        assert len(set(pointers)) == len(pointers)


def test_accumulators_broadcast_against_the_parameter(rule: Rule) -> None:
    params = draw(1)
    for name, acc in rule.init_state(params).accumulators.items():
        shape = tuple(params[name].shape) or (1,)
        for key, a in acc.items():
            if key not in rule.tensor_keys:
                assert a.ndim - len(shape) in (0, 1)
                assert all(ours in (1, theirs) for ours, theirs in zip(a.shape[-len(shape) :], shape, strict=True))


def test_missing_gradient_is_a_key_error(rule: Rule) -> None:
    params = draw(1)
    grads = draw(2)
    del grads["b"]
    with pytest.raises(KeyError, match="b"):
        rule.update(grads, params, rule.init_state(params), None, torch.tensor(HORIZON))


def test_missing_number_of_steps_is_told_by_the_rules_that_need_it(rule: Rule) -> None:
    params, grads = draw(1), draw(2)
    state = rule.init_state(params)
    if not rule.needs_num_steps:
        rule.update(grads, params, state, torch.tensor(0.5))
        return
    with pytest.raises(ValueError, match=f"'{rule.name}' needs .* num_steps"):
        rule.update(grads, params, state, torch.tensor(0.5))


def test_loss_matters_to_the_rules_that_read_it_and_none_is_as_if_never_told(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, grads, planned = draw(1), draw(2), torch.tensor(HORIZON)
    params, state = run(rule, params, rule.init_state(params), 4)
    without, state_without = rule.update(grads, params, state, None, planned)
    told = [rule.update(grads, params, state, torch.tensor(loss), planned) for loss in (0.1, 0.9)]
    if not rule.needs_loss:
        for other in told:
            assert_trees_equal(other, (without, state_without))
        return
    # What the loss says may be for later steps.
    low, high = (rule.update(grads, *after, None, planned)[0] for after in told)
    assert any(bool((low[name] != p).any()) for name, p in high.items())
    monkeypatch.setattr(features, "update_loss_buffer", lambda buffer, loss, decays: buffer)
    monkeypatch.setattr(last_loss, "update_loss", lambda known, loss: known)
    frozen = rule.update(grads, params, state, torch.tensor(0.1), planned)
    assert_trees_equal(frozen, (without, state_without))


def test_rules_start_the_same_every_time_and_leave_the_global_generator_alone(rule: Rule) -> None:
    before = torch.get_rng_state()
    again = [RULES[rule.name](**rule.config).state_dict() for _ in range(2)]
    assert_trees_equal(*again)
    params = draw(1)
    run(rule, params, rule.init_state(params), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_rule_read_from_its_file_steps_the_same(rule: Rule, tmp_path: Path) -> None:
    read = files.load(files.save(rule, tmp_path / "rule.safetensors"))
    assert type(read) is type(rule)
    assert read.config == rule.config
    assert [w.requires_grad for w in read.parameters()] == [w.requires_grad for w in rule.parameters()]
    params = draw(1)
    ours = run(read, params, read.init_state(params), 3)
    assert_trees_equal(ours, run(rule, params, rule.init_state(params), 3))


# -- batches of tasks, orders of tensors, layouts ----------------------------------------------------------------------


def test_batch_of_tasks_at_different_steps_equals_one_task_at_a_time(rule: Rule) -> None:
    rule, double = rule.double(), torch.float64
    alone = []
    for task in range(3):
        params = {name: p[task] for name, p in draw(1, 3, dtype=double).items()}
        alone.append(run(rule, params, rule.init_state(params), 2 * task))
    batched: tuple[Params, State] = tree_map(lambda *xs: torch.stack(xs), *alone)
    assert batched[1].step.tolist() == [0, 2, 4]
    together = run(rule, *batched, 3, (3,))
    for task, (params, state) in enumerate(alone):
        for step in range(3):
            grads = {name: g[task] for name, g in draw(100 + step, 3, dtype=double).items()}
            loss = draw_loss(step, (3,), double)[task]
            params, state = rule.update(grads, params, state, loss, torch.tensor(HORIZON))
        assert_trees_close(tree_map(itemgetter(task), together), (params, state), SAME)


def test_one_set_of_meta_weights_per_slot_equals_slot_by_slot(rule: Rule) -> None:
    rule, slots, steps = rule.double(), 3, 3
    scales = torch.tensor([1.0, 0.97, 0.94], dtype=torch.float64)
    weights = {name: scales.view(slots, *[1] * w.ndim) * w.detach() for name, w in rule.named_parameters()}
    params = draw(1, slots, dtype=torch.float64)

    def stacked(*args: object) -> tuple[Params, State]:
        return functional_call(rule, weights, args)

    together = run(stacked, params, rule.init_state(params, 1), steps, (slots,))
    for slot in range(slots):
        own = {name: w[slot] for name, w in weights.items()}

        def single(*args: object, own: Params = own) -> tuple[Params, State]:
            return functional_call(rule, own, args)

        shared = run(single, params, rule.init_state(params, 1), steps, (slots,))
        pick = itemgetter(slot)
        assert_trees_close(tree_map(pick, together), tree_map(pick, shared), SAME)
        if slot:
            assert any(bool((a[slot] != a[0]).any()) for a in together[0].values())


def test_elementwise_rules_do_not_see_tensor_boundaries(rule: Rule) -> None:
    if not rule.elementwise:
        pytest.skip("looks at whole tensors")
    rule, params = rule.double(), draw(1, dtype=torch.float64)
    flat = {"flat": torch.cat([p.reshape(-1) for p in params.values()])}
    grads = [draw(100 + step, dtype=torch.float64) for step in range(3)]
    moved = move(rule, params, grads)
    flat_moved = move(rule, flat, [{"flat": torch.cat([g[name].reshape(-1) for name in params])} for g in grads])
    assert_trees_close(torch.cat([p.reshape(-1) for p in moved.values()]), flat_moved["flat"], SAME)


def test_order_and_names_of_parameters_do_not_matter(rule: Rule) -> None:
    if PLACE in rule.tensor_keys:
        return  # such a rule asks for the order, and tests/rules/test_graph.py for what it makes of it
    rule, params = rule.double(), draw(1, dtype=torch.float64)
    grads = [draw(step, dtype=torch.float64) for step in range(2, 6)]
    expected = move(rule, params, grads)
    for order in (reversed(params), sorted(params, key=lambda name: (len(name), name))):
        names = {name: name if name == "embed" else f"model.{i}" for i, name in enumerate(order)}
        renamed = move(
            rule,
            {new: params[old] for old, new in names.items()},
            [{new: g[old] for old, new in names.items()} for g in grads],
        )
        assert list(renamed) == list(names.values())
        assert_trees_close({name: renamed[names[name]] for name in params}, expected, SAME)


def test_tensors_of_equal_content_get_equal_steps(rule: Rule) -> None:
    if PLACE in rule.tensor_keys:
        return  # equal tensors at different places are told apart
    rule, params = rule.double(), draw(1, dtype=torch.float64)
    grads = [draw(step, dtype=torch.float64) for step in range(2, 5)]
    twice = [{f"{name}{i}": p for i in range(2) for name, p in tree.items()} for tree in (params, *grads)]
    moved = move(rule, twice[0], twice[1:])
    for name in params:
        assert_trees_close(moved[f"{name}0"], moved[f"{name}1"], SAME)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1), (1, 1)], ids=str)
def test_convolution_with_a_window_of_one_steps_as_a_linear_layer(rule: Rule, shape: tuple[int, int]) -> None:
    rule, shapes = rule.double(), {"w": shape}
    params, *grads = (draw(step, shapes=shapes, dtype=torch.float64) for step in range(1, 5))
    expected = move(rule, params, grads)["w"]
    for window in ((1,), (1, 1), (1, 1, 1)):
        trees = [{"w": tree["w"].reshape(*shape, *window)} for tree in (params, *grads)]
        assert_trees_close(move(rule, trees[0], trees[1:])["w"].reshape(shape), expected, SAME)


@pytest.mark.parametrize("name", ["celo2", "celo2_base"])
def test_celo2_treats_every_position_of_a_window_as_a_matrix_of_its_own(name: str) -> None:
    rule = make_rule(name).double()
    for shape in ((4, 5, 3), (3, 3, 2), (5, 4, 2, 3)):  # the window is smaller: it is not what is factored
        params, *grads = (draw(step, shapes={"w": shape}, dtype=torch.float64)["w"] for step in range(1, 5))
        together = move(rule, {"w": params}, [{"w": g} for g in grads])["w"].flatten(2)
        for i in range(together.shape[-1]):
            own = move(rule, {"w": params.flatten(2)[..., i]}, [{"w": g.flatten(2)[..., i]} for g in grads])["w"]
            assert_trees_close(together[..., i], own, SAME)


def test_learned_optimizer_makes_the_rules_own_steps_on_a_model_of_all_shapes(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lr 1000, so that steps are not lost in the rounding of fp32."""
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_WITH_TEMPORARIES", 1)
    shapes, lr = SHAPES | {"large": (40, 60)}, 1000  # more than one chunk
    start = draw(1, shapes=shapes)
    ours = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = LearnedOptimizer(ours.items(), rule, lr=lr, num_steps=HORIZON)
    theirs, own = {name: p.double() for name, p in start.items()}, rule.double()
    state = own.init_state(theirs)
    for step in range(3):
        grads, loss = draw(100 + step, shapes=shapes), draw_loss(step)
        for name, g in grads.items():
            ours[name].grad = g
        optimizer.step(loss=loss)
        grads = {name: g.double() for name, g in grads.items()}
        with torch.no_grad():
            new, state = own.update(grads, theirs, state, loss.double(), torch.tensor(HORIZON))
        theirs = {name: torch.lerp(p, new[name], lr) for name, p in theirs.items()}
    for name, acc in state.accumulators.items():
        moved, expected = ours[name].detach() - start[name], theirs[name] - start[name]
        found = {key: optimizer.state[ours[name]][key].double() for key in acc}
        # fp32; logarithms of rates are small differences of numbers near 7, and where a factor has no full rank, its
        # basis multiplies rounding by the inverse of the ridge, in two iterations twice; what is measured of that step
        # is a share of 1, however small.
        rounding, least = (2**-23 / RIDGE**2, 5e-3) if rule.name == "base" else (1e-4, 1e-3)
        assert_trees_close((moved.double(), found), (expected, acc), rounding, least)


# -- meta-gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_meta_gradient_is_finite_and_not_zero_where_gradients_are_zero(rule: Rule, steps: int) -> None:
    params = {"w": torch.ones(2, 3), "still": torch.zeros(2, 2), "b": torch.zeros(3)}
    state = rule.init_state(params)
    zeros = {"still": torch.zeros(2, 2), "b": torch.zeros(3)}
    grads = {"w": torch.tensor([[0.0, 1.0, -1e-20], [1e10, 0.0, 1e-3]]), **zeros}
    for _ in range(steps):
        params, state = rule.update(grads, params, state, torch.ones(()), torch.tensor(HORIZON))
    weights = rule.meta_weights()
    total = sum(p.sum() for p in params.values())
    meta = torch.autograd.grad(total, weights.values(), allow_unused=True)
    found = {name: g for name, g in zip(weights, meta, strict=True) if g is not None}
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert any(bool(g.any()) for g in found.values())


def loss_of(params: Params, step: int) -> Tensor:
    """Quartic, of very different scale per row; the middle row of `w` and all of `b` are still in the first step."""
    target = draw(50 + step, shapes=FEW_SHAPES, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for name, p in params.items():
        scale = target[name].abs()
        if step == 0 and name in ("w", "b"):
            scale = scale * torch.tensor([[1.0], [0.0], [1.0]]) if name == "w" else 0 * scale
        distance = 0.3 * p - target[name]
        total = total + (scale * (distance.square() + 0.01 * distance**4)).sum()
    return total / 1000


Recorded = list[tuple[tuple[Tensor, ...], Tensor]]


def measure_way(rule: Rule, weights: Params, params: Params, recorded: Recorded | None) -> Tensor:
    """A number that tells where three steps under meta-weights lead.

    Args:
        recorded: gradients and losses, which are taken from here and not differentiated (first order), or put here if
            there are none yet; None makes them depend on the parameters (second order).
    """
    start, state = params, rule.init_state(params)
    for step in range(3):
        if recorded is None:
            params = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
            loss = loss_of(params, step)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        else:
            if len(recorded) == step:
                at = {name: p.detach().requires_grad_() for name, p in params.items()}
                loss = loss_of(at, step)
                recorded.append((torch.autograd.grad(loss, list(at.values())), loss.detach()))
            grads, loss = recorded[step]
        args = (dict(zip(params, grads, strict=True)), params, state, loss, torch.tensor(HORIZON))
        params, state = functional_call(rule, weights, args)
    coefficients = draw(2, shapes=FEW_SHAPES, dtype=torch.float64)
    return sum((c * (params[name] - start[name])).sum() for name, c in coefficients.items())


def draw_directions(weights: Params) -> Params:
    """Random directions in the meta-weights, each of its weight's size."""
    generator, directions = make_generator(3), {}
    for name, w in weights.items():
        size = float(w.detach().abs().mean()) or 0.01
        directions[name] = size * torch.randn(w.shape, generator=generator, dtype=w.dtype)
    return directions


@pytest.mark.parametrize("still", [(), ("b", "one")], ids=["", "some parameters 0"])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_equals_finite_differences(rule: Rule, order: int, still: tuple[str, ...]) -> None:
    rule, recorded = rule.double(), [] if order == 1 else None
    params = draw(1, shapes=FEW_SHAPES, dtype=torch.float64)
    params |= {name: torch.zeros_like(params[name]) for name in still}
    weights = {name: w.detach().requires_grad_(w.requires_grad) for name, w in rule.named_parameters()}
    learned = {name: w for name, w in weights.items() if w.requires_grad}
    directions = draw_directions(learned)
    gradient = torch.autograd.grad(measure_way(rule, weights, params, recorded), list(learned.values()))
    assert all(bool(g.isfinite().all()) for g in gradient)
    slope = sum((g * directions[name]).sum() for name, g in zip(learned, gradient, strict=True))
    h, ends = 1e-5, []
    for side in (h, -h):
        moved = weights | {name: w.detach() + side * directions[name] for name, w in learned.items()}
        ends.append(measure_way(rule, moved, params, recorded).detach())
    assert float(slope) != 0
    # float64: an error of h^2 times the curvature, and rounding. No seed here is within h of a kink of relu or clamp,
    # where the derivative is one of two numbers and the difference lies between them.
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=0)


# -- meta-training -----------------------------------------------------------------------------------------------------


class Bowl(TaskFamily):
    """`|A (w - t) + b|^2`: a matrix and a vector with curvatures from 0.1 to 10, starting far from the minimum."""

    name = "bowl"
    horizon = 15

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def draw(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=self.dtype)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        scales = torch.logspace(-0.5, 0.5, 4, dtype=self.dtype)
        return {"A": self.draw(generator, 6, 4) * scales, "t": self.draw(generator, 4, 3)}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"w": self.draw(generator, 4, 3), "b": self.draw(generator, 3)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return tasks

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (batch["A"] @ (params["w"] - batch["t"]) + params["b"]).square().mean()


def test_second_order_of_the_inner_loop_equals_finite_differences(rule: Rule) -> None:
    rule, family, tasks = rule.double(), Bowl(torch.float64), 2
    weights = {name: w.detach() for name, w in rule.named_parameters()}
    learned = list(rule.meta_weights())
    directions = draw_directions({name: weights[name] for name in learned})

    def end(moved: Params | None) -> Tensor:
        slots = None if moved is None else {name: w.expand(tasks, *w.shape) for name, w in (weights | moved).items()}
        loop = InnerLoop(rule, family, 1, order=2, meta_weights=slots)  # with seed 0, relu of celo2 is at a kink
        return loop.unroll(loop.start(torch.arange(tasks)), 4, restart=False).losses[-1].mean()

    gradient = torch.autograd.grad(end(None), [*rule.meta_weights().values()], allow_unused=True)
    slope = sum((g * directions[name]).sum() for name, g in zip(learned, gradient, strict=True) if g is not None)
    h = 1e-5
    ends = [end({name: weights[name] + side * directions[name] for name in learned}).detach() for side in (h, -h)]
    assert float(slope) != 0
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=0)  # as above


LONG = {"celo_adam", "celo2_base", "hierarchical_rnn"}  # a relative of each is in the quick suite
LEARNED = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
    for name, rule in sorted(RULES.items())
    if not issubclass(rule, HandDesigned)
]


@pytest.mark.parametrize("name", LEARNED)
def test_a_short_meta_training_makes_a_rule_converge_on_new_quadratics(name: str) -> None:
    rule = make_quick(name)
    loop = InnerLoop(rule, Bowl(), 0)

    def judge() -> tuple[float, float]:
        """First and last loss on tasks that are not trained on; medians, as an untrained rule may blow one up."""
        with torch.no_grad():
            window = loop.unroll(loop.start(torch.arange(1000, 1032)), Bowl.horizon, restart=False)
        return float(window.first_loss[0].median()), float(window.losses[-1].median())

    start, untrained = judge()
    weights = rule.meta_weights()
    outer = torch.optim.Adam(weights.values(), 0.03)
    estimator = Truncated(num_steps=5, objective="log")
    slots = estimator.start(loop, torch.arange(8))
    for _ in range(60):
        gradient, _, slots, _ = estimator.estimate(loop, slots)
        for key, weight in weights.items():
            weight.grad = gradient[key]
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        outer.step()
    _, trained = judge()
    assert trained < 0.25 * min(start, untrained)


@pytest.mark.parametrize("name", ["lstm", "rnnprop"])
@pytest.mark.parametrize("hidden", [0, 100_000])
def test_hidden_width_out_of_range_is_refused_before_anything_is_allocated(name: str, hidden: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 1024, got {hidden}"):
        RULES[name](hidden=hidden)
