"""What every rule in RULES must do, and that the hand-designed ones are torch.optim's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from lopt import checkpoint
from lopt.rules import RULES, HandDesigned, Rule, State
from lopt.tensors import Params, make_generator

SHAPES = {"w": (3, 4), "b": (4,), "s": (), "e": (0, 2), "one": (1, 1)}
HORIZON = 50  # planned steps
FORMULA = 1e-5  # the same formula in another order of operations, fp32, over a few steps


@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(request.param)


def make_rule(name: str) -> Rule:
    """A rule whose meta-weights are no round numbers: hyper-parameters lie in (0, 1), so they are scaled."""
    rule = RULES[name]()
    generator = make_generator(7)
    with torch.no_grad():
        for weight in rule.parameters():
            weight *= 1 - 0.05 * torch.rand(weight.shape, generator=generator)
    return rule


def draw(seed: int, *batch: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Params:
    """Tensors whose rows differ in scale by powers of ten."""
    generator = make_generator(seed)
    result = {}
    for name, shape in shapes.items():
        x = torch.randn((*batch, *shape), generator=generator)
        scale = 10 ** (2 * torch.rand(x.shape[:-1], generator=generator) - 1)
        result[name] = x * (scale[..., None] if x.ndim else scale)
    return result


def run(
    rule: Callable[..., tuple[Params, State]], params: Params, state: State, steps: int, batch: tuple[int, ...] = ()
):
    """`steps` updates with gradients that do not depend on the parameters."""
    shapes = {name: tuple(p.shape[len(batch) :]) for name, p in params.items()}
    for step in range(steps):
        loss, planned = torch.full(batch, 0.5), torch.full(batch, HORIZON)
        params, state = rule(draw(100 + step, *batch, shapes=shapes), params, state, loss, planned)
    return params, state


def assert_trees_close(actual: object, expected: object, rtol: float) -> None:
    """Leaf by leaf, relative to the largest number of the leaf."""
    ours, theirs = tree_flatten(actual), tree_flatten(expected)
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            torch.testing.assert_close(a, b, rtol=0, atol=rtol * b.abs().max().item())


def assert_trees_equal(actual: object, expected: object) -> None:
    assert_trees_close(actual, expected, 0.0)


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
    assert all(bool(x.isfinite().all()) for x in tree_flatten((new, new_state))[0])


def test_update_moves_parameters_of_every_shape(rule: Rule) -> None:
    params = draw(1)
    if rule.name == "linear":
        rule.weights.data += 0.01
    new, _ = run(rule, params, rule.init_state(params), 1)
    assert all(bool((new[name] != p).any()) for name, p in params.items() if p.numel())


def test_update_changes_none_of_its_arguments(rule: Rule) -> None:
    params = draw(1, 2)
    params, state = run(rule, params, rule.init_state(params, 1), 1, (2,))
    grads, loss, planned = draw(5, 2), torch.ones(2), torch.full((2,), HORIZON)
    arguments = tree_map(Tensor.detach, (grads, params, state, loss, planned))
    before = copy.deepcopy(arguments)
    versions = [x._version for x in tree_flatten(arguments)[0]]
    rule.update(*arguments)
    assert_trees_equal(arguments, before)
    assert [x._version for x in tree_flatten(arguments)[0]] == versions


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
            if key not in rule.row_keys:
                assert a.ndim - len(shape) in (0, 1)
                assert all(ours in (1, theirs) for ours, theirs in zip(a.shape[-len(shape) :], shape, strict=True))


@pytest.mark.parametrize("steps", [1, 4])
def test_meta_gradient_is_finite_and_not_zero_where_gradients_are_zero(rule: Rule, steps: int) -> None:
    params = {"w": torch.ones(2, 3)}
    state = rule.init_state(params)
    grads = {"w": torch.tensor([[0.0, 1.0, -1e-20], [1e10, 0.0, 1e-3]])}
    for _ in range(steps):
        params, state = rule.update(grads, params, state, torch.ones(()), torch.tensor(HORIZON))
    weights = rule.meta_weights()
    meta = torch.autograd.grad(params["w"].sum(), weights.values(), allow_unused=True)
    found = {name: g for name, g in zip(weights, meta, strict=True) if g is not None}
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert any(bool(g.any()) for g in found.values())


def test_batch_of_tasks_at_different_steps_equals_one_task_at_a_time(rule: Rule) -> None:
    alone = []
    for task in range(3):
        params = {name: p[task] for name, p in draw(1, 3).items()}
        alone.append(run(rule, params, rule.init_state(params), 2 * task))
    batched: tuple[Params, State] = tree_map(lambda *xs: torch.stack(xs), *alone)
    assert batched[1].step.tolist() == [0, 2, 4]
    together = run(rule, *batched, 3, (3,))
    for task, (params, state) in enumerate(alone):
        for step in range(3):
            grads = {name: g[task] for name, g in draw(100 + step, 3).items()}
            params, state = rule.update(grads, params, state, torch.tensor(0.5), torch.tensor(HORIZON))
        # batched matrix products may add in another order
        assert_trees_close(tree_map(itemgetter(task), together), (params, state), FORMULA)


def test_one_set_of_meta_weights_per_slot_equals_slot_by_slot(rule: Rule) -> None:
    slots, steps = 3, 3
    scales = torch.tensor([1.0, 0.97, 0.94])
    weights = {name: scales.view(slots, *[1] * w.ndim) * w.detach() for name, w in rule.named_parameters()}
    params = draw(1, slots)

    def stacked(*args: object) -> tuple[Params, State]:
        return functional_call(rule, weights, args)

    together = run(stacked, params, rule.init_state(params, 1), steps, (slots,))
    for slot in range(slots):
        own = {name: w[slot] for name, w in weights.items()}

        def single(*args: object, own: Params = own) -> tuple[Params, State]:
            return functional_call(rule, own, args)

        shared = run(single, params, rule.init_state(params, 1), steps, (slots,))
        pick = itemgetter(slot)
        assert_trees_close(tree_map(pick, together), tree_map(pick, shared), FORMULA)
        if slot:
            assert any(bool((a[slot] != a[0]).any()) for a in together[0].values())


def test_elementwise_rules_do_not_see_tensor_boundaries(rule: Rule) -> None:
    if not rule.elementwise:
        pytest.skip("looks at whole tensors")
    params = draw(1)
    flat = {"flat": torch.cat([p.reshape(-1) for p in params.values()])}
    state, flat_state = rule.init_state(params), rule.init_state(flat)
    for step in range(3):
        grads, planned = draw(100 + step), torch.tensor(HORIZON)
        params, state = rule.update(grads, params, state, None, planned)
        flat_grads = {"flat": torch.cat([g.reshape(-1) for g in grads.values()])}
        flat, flat_state = rule.update(flat_grads, flat, flat_state, None, planned)
    joined = torch.cat([p.reshape(-1) for p in params.values()])
    assert_trees_close(joined, flat["flat"], FORMULA)


def test_order_of_parameters_does_not_matter(rule: Rule) -> None:
    params = draw(1)
    grads = draw(2)
    backwards = dict(reversed(params.items()))
    loss, planned = torch.tensor(0.5), torch.tensor(HORIZON)
    new, _ = rule.update(grads, params, rule.init_state(params), loss, planned)
    other, _ = rule.update(grads, backwards, rule.init_state(backwards), loss, planned)
    assert_trees_equal({name: other[name] for name in new}, new)


def test_missing_gradient_is_a_key_error(rule: Rule) -> None:
    params = draw(1)
    grads = draw(2)
    del grads["b"]
    with pytest.raises(KeyError, match="b"):
        rule.update(grads, params, rule.init_state(params), None, torch.tensor(HORIZON))


def test_rules_start_the_same_every_time_and_leave_the_global_generator_alone(rule: Rule) -> None:
    before = torch.get_rng_state()
    again = [RULES[rule.name]().state_dict() for _ in range(2)]
    assert_trees_equal(*again)
    params = draw(1)
    run(rule, params, rule.init_state(params), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_rule_read_from_its_file_steps_the_same(rule: Rule, tmp_path: Path) -> None:
    read = checkpoint.load(checkpoint.save(rule, tmp_path / "rule.safetensors"))
    assert type(read) is type(rule)
    assert read.config == rule.config
    assert [w.requires_grad for w in read.parameters()] == [w.requires_grad for w in rule.parameters()]
    params = draw(1)
    ours = run(read, params, read.init_state(params), 3)
    assert_trees_equal(ours, run(rule, params, rule.init_state(params), 3))


# -- the hand-designed ones ------------------------------------------------------------------------

TORCH: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=0.05, weight_decay=wd),
    "momentum": lambda p, wd: torch.optim.SGD(p, lr=0.05, momentum=0.8),
    "nesterov": lambda p, wd: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "rmsprop": lambda p, wd: torch.optim.RMSprop(p, lr=0.05, alpha=0.9),
    "adam": lambda p, wd: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95)),
    "adamw": lambda p, wd: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=wd),
    "nadamw": lambda p, wd: torch.optim.NAdam(
        p, lr=0.05, betas=(0.8, 0.95), weight_decay=wd, decoupled_weight_decay=True
    ),
}
DECAYING = ("sgd", "adamw", "nadamw")  # torch couples the weight decay of the others to their momenta
CASES = [(name, 0.0) for name in TORCH] + [(name, 0.1) for name in DECAYING]


def make_hand_designed(name: str, weight_decay: float) -> Rule:
    hyper = {"momentum": 0.8} if name in ("momentum", "nesterov") else {}
    hyper |= {"beta1": 0.8, "beta2": 0.95} if "adam" in name else {}
    hyper |= {"alpha": 0.9} if name == "rmsprop" else {}
    return RULES[name](lr=0.05, weight_decay=weight_decay, **hyper)


def loss_of(params: Params, step: int) -> Tensor:
    """Curved, of very different scale per row, and not the same twice."""
    target = draw(1000 + step)
    return sum(((p - 0.1 * target[name]) ** 2 * target[name].abs()).sum() for name, p in params.items())


def test_every_hand_designed_rule_has_its_torch_optimizer() -> None:
    assert {name for name, rule in RULES.items() if issubclass(rule, HandDesigned)} == set(TORCH)


@pytest.mark.parametrize(("name", "weight_decay"), CASES, ids=str)
def test_hand_designed_rule_equals_torch_over_100_steps(name: str, weight_decay: float) -> None:
    theirs = {key: p.clone().requires_grad_() for key, p in draw(1).items()}
    optimizer = TORCH[name](list(theirs.values()), weight_decay)
    rule = make_hand_designed(name, weight_decay)
    ours = {key: p.detach().clone() for key, p in theirs.items()}
    state = rule.init_state(ours)
    largest = dict.fromkeys(ours, 0.0)
    for step in range(100):
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        optimizer.step()
        leaves = {key: p.detach().requires_grad_() for key, p in ours.items()}
        grads = torch.autograd.grad(loss_of(leaves, step), list(leaves.values()))
        with torch.no_grad():
            ours, state = rule.update(dict(zip(leaves, grads, strict=True)), leaves, state)
        for key, p in theirs.items():
            if p.numel():
                # fp32 rounds by 6e-8 of what the parameter was when it was largest; the two round in another order
                largest[key] = max(largest[key], float(p.detach().abs().max()))
                torch.testing.assert_close(ours[key], p.detach(), rtol=0, atol=1e-5 * largest[key])


def test_cosine_schedule_ends_at_zero_and_needs_num_steps() -> None:
    rule = RULES["sgd"](lr=0.1, schedule="cosine")
    params, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    state = rule.init_state(params)
    for step, moved in ((0, 0.1), (5, 0.05), (10, 0.0), (12, 0.0)):
        new, _ = rule.update(grads, params, state._replace(step=torch.tensor(step)), None, torch.tensor(10))
        torch.testing.assert_close(1 - new["w"], torch.full((2,), moved), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="num_steps"):
        rule.update(grads, params, state)


@pytest.mark.parametrize("name", ["lstm", "rnnprop"])
@pytest.mark.parametrize("hidden", [0, 100_000])
def test_hidden_width_out_of_range_is_refused_before_anything_is_allocated(name: str, hidden: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 1024, got {hidden}"):
        RULES[name](hidden=hidden)
