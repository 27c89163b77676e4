"""LearnedOptimizer: the rule's own steps, chunk by chunk, behind the contract of torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_cases import SizedMomenta, make_quick
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lopt
from bench.memory import measure_allocations
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.optim import learned_optimizer
from lopt.optim.torch_backend import chunked
from lopt.rules import RULES, Accumulators, Clock, Decision, Elements, Layout, Means, Rule, State, Visit, files
from lopt.rules.stages import AllTensors, Finished

CHUNK = 1024  # the smallest chunk
LOSS = 0.5
ROUNDING = 1e-6  # fp32, the same formula; vectorised loops treat the last elements of a chunk in their own way


class UnitNorm(Rule):
    """A step of norm `size` per tensor, larger with the loss, smaller with progress: not elementwise."""

    name = "unit_norm"

    def __init__(self, size: float = 0.1, planned: bool = False, reads_loss: bool = False) -> None:
        super().__init__()
        self.needs_loss = reads_loss
        self.size = nn.Parameter(torch.tensor(size))
        self.needs_num_steps = planned

    tensor_keys = ("told",)

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {"m": torch.zeros_like(p), "told": torch.zeros(*p.shape[: p.ndim - layout.ndim], 2)}

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        told = torch.zeros_like(tensors.tensor_state["told"])
        if tensors.loss is not None:
            told[..., 0] = tensors.loss
        progress = tensors.clock.progress(torch.float32)
        if progress is not None:
            told[..., 1] = progress.clamp(max=1)
        return {"told": told}, {"size": self.size * (1 + told[..., 0]) * (1 - told[..., 1])}

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        return Decision(decided=shared)

    def move(self, e: Elements, decided: Means) -> Visit:
        m = 0.9 * e.acc["m"] + e.g
        return Visit({"m": m}, delta=-m)

    def finish(self, delta: Tensor, read: Callable[[], Elements], decided: Means, layout: Layout) -> Finished:
        norm = torch.linalg.vector_norm(delta, dim=layout.axes, keepdim=True)
        return Finished(delta, decided["size"].reshape(*decided["size"].shape, *[1] * layout.ndim) / (norm + 1e-8))


OTHERS: dict[str, type[Rule]] = {"unit_norm": UnitNorm, "sized_momenta": SizedMomenta}


def make_rule(name: str) -> Rule:
    return OTHERS[name]() if name in OTHERS else make_quick(name)


def draw(seed: int, *shape: int) -> Tensor:
    """Rows of very different scale."""
    generator = make_generator(seed)
    x = torch.randn(shape, generator=generator)
    scale = 10 ** (2 * torch.rand(shape[0], generator=generator) - 1)
    return x * scale.view(-1, *[1] * (len(shape) - 1))


def follow(rule: Rule, p: Tensor, grads: list[Tensor], num_steps: int | None = None) -> tuple[Tensor, State]:
    """The rule's own trajectory."""
    params = {"p": p.detach().clone()}
    state = rule.init_state(params)
    with torch.no_grad():
        for g in grads:
            planned = None if num_steps is None else torch.tensor(num_steps)
            loss = torch.tensor(LOSS) if rule.needs_loss else None
            params, state = rule.update({"p": g}, params, state, loss, planned)
    return params["p"], state


def step_with(optimizer: LearnedOptimizer, p: Tensor, grads: list[Tensor]) -> None:
    for g in grads:
        p.grad = g.clone()
        optimizer.step(loss=LOSS if optimizer.rule.needs_loss else None)


def assert_close(actual: Tensor, expected: Tensor, rtol: float = ROUNDING) -> None:
    """Relative to the largest element."""
    assert actual.shape == expected.shape
    if expected.numel():
        atol = rtol * float(expected.detach().abs().max())
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=atol)


@pytest.fixture(params=["adam", "lstm", *OTHERS])
def rule(request: pytest.FixtureRequest) -> Rule:
    """One hand-designed, one learned, two that are not elementwise."""
    return make_rule(request.param)


# -- the steps are the rule's ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("name", [*sorted(RULES), *OTHERS])
def test_steps_are_the_rules_own_at_chunk_boundaries(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_WITH_TEMPORARIES", 1)
    rule = make_rule(name)
    p = nn.Parameter(draw(0, size))
    grads = [draw(1 + i, size) for i in range(3)]
    planned = 10 if rule.needs_num_steps else None
    expected, state = follow(rule, p, grads, planned)
    optimizer = LearnedOptimizer([p], rule, num_steps=planned)
    step_with(optimizer, p, grads)
    assert_close(p, expected)
    assert int(optimizer.state[p]["step"]) == 3
    assert optimizer.state[p].keys() == {"step", *state.accumulators["p"]}
    for key, value in state.accumulators["p"].items():
        assert_close(optimizer.state[p][key], value)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (2, 3), (2, 1, 3, 2, 2)], ids=str)
def test_steps_are_the_rules_own_for_every_shape(rule: Rule, shape: tuple[int, ...]) -> None:
    generator = make_generator(0)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    grads = [torch.randn(shape, generator=generator) for _ in range(3)]
    expected, state = follow(rule, p, grads)
    optimizer = LearnedOptimizer([p], rule)
    step_with(optimizer, p, grads)
    assert_close(p, expected)
    for key, value in state.accumulators["p"].items():
        assert optimizer.state[p][key].shape == value.shape


def test_layout_of_parameter_and_gradient_does_not_matter(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "CPU_CHUNK_WITH_TEMPORARIES", 1)
    dense = draw(0, 48, 4, 3, 3)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.clone(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ]
    grads = [draw(1 + i, 48, 1, 3, 3).expand_as(dense) for i in range(3)]
    expected, _ = follow(rule, dense, grads)
    for layout in layouts:
        p = nn.Parameter(layout(dense))
        assert not p.is_contiguous()
        before = p.stride(), p.data_ptr()
        optimizer = LearnedOptimizer([p], rule)
        for g in grads:
            p.grad = g
            optimizer.step()
        assert_close(p, expected)
        assert (p.stride(), p.data_ptr()) == before


def test_learned_optimizer_with_the_adam_rule_trains_as_adam() -> None:
    models = [make_model() for _ in range(2)]
    ours = LearnedOptimizer(models[0].parameters(), RULES["adamw"](lr=0.01))
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.01)
    losses = [train(model, optimizer, 20) for model, optimizer in zip(models, (ours, theirs), strict=True)]
    assert losses[0][-1] < 0.9 * losses[0][0]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(a, b, 1e-5)  # 20 steps that each round in another order


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=make_generator(index)))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = make_generator(step % 5)
        x = torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- options ---------------------------------------------------------------------------------------


def test_lr_multiplies_the_learned_step_and_weight_decay_is_decoupled(rule: Rule) -> None:
    start, grads = draw(0, 50), [draw(1, 50)]
    full, _ = follow(rule, start, grads)
    p = nn.Parameter(start.clone())
    step_with(LearnedOptimizer([p], rule, lr=0.25, weight_decay=0.1), p, grads)
    assert_close(p - start, 0.25 * (full - start) - 0.025 * start, 1e-5)  # differences of rounded numbers


def test_zero_lr_changes_no_bit_of_the_parameters_but_the_state_goes_on(rule: Rule) -> None:
    p = nn.Parameter(torch.tensor([-0.0, 0.0, 1.0, 1e-45]))
    bits = p.detach().clone().view(torch.int32)
    optimizer = LearnedOptimizer([p], rule, lr=0.0, weight_decay=0.1)
    step_with(optimizer, p, [torch.ones(4), torch.full((4,), float("inf"))])
    assert torch.equal(p.detach().view(torch.int32), bits)
    assert int(optimizer.state[p]["step"]) == 1  # the second gradient is not finite


def test_groups_have_options_of_their_own() -> None:
    still, slow, fast = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [{"params": [still], "lr": 0.0}, {"params": [slow], "lr": 0.5}, {"params": [fast], "weight_decay": 0.5}]
    optimizer = LearnedOptimizer(groups, RULES["sgd"](lr=0.1))
    for p in (still, slow, fast):
        p.grad = torch.ones(3)
    optimizer.step()
    assert still.tolist() == [1.0] * 3
    assert_close(slow, torch.full((3,), 0.95))
    assert_close(fast, torch.full((3,), 0.4))
    later = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [later], "lr": 2.0})
    later.grad = torch.ones(1)
    optimizer.step()
    assert_close(later, torch.tensor([0.8]))


@pytest.mark.parametrize("kind", ["elementwise", "whole"])
def test_num_steps_tells_the_rule_how_far_training_is(kind: str) -> None:
    rule = RULES["sgd"](lr=0.1, schedule="cosine") if kind == "elementwise" else UnitNorm(planned=True)
    short, long = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    grads = [torch.ones(2)] * 6  # beyond the end of the short plan, where progress stays 1
    optimizer = LearnedOptimizer([{"params": [short], "num_steps": 4}, {"params": [long]}], rule, num_steps=8)
    for g in grads:
        short.grad, long.grad = g.clone(), g.clone()
        optimizer.step()
    assert_close(short, follow(rule, torch.ones(2), grads, 4)[0])
    assert_close(long, follow(rule, torch.ones(2), grads, 8)[0])
    assert not torch.equal(short, long)


def test_rule_that_needs_num_steps_says_so() -> None:
    p, rule = nn.Parameter(torch.ones(2)), RULES["sgd"](schedule="cosine")
    with pytest.raises(ValueError, match="num_steps"):
        LearnedOptimizer([p], rule)
    optimizer = LearnedOptimizer([{"params": [p], "num_steps": 5}], rule)
    with pytest.raises(ValueError, match="num_steps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": torch.ones(2)}, r"lr must be 1-element, got shape \[2\]"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, got -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"rule": "another"}, "runs rule sgd-.* made by another"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(1))
    if "rule" not in options:
        with pytest.raises(ValueError, match=message):
            LearnedOptimizer([p], RULES["sgd"](), **options)
    optimizer = LearnedOptimizer([p], RULES["sgd"]())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **options})
    assert len(optimizer.param_groups) == 1


# -- the rule --------------------------------------------------------------------------------------


def test_rule_is_taken_by_object_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PRETRAINED", tmp_path)
    rule = RULES["lstm"](hidden=3)
    path = lopt.save(rule, tmp_path / f"{learned_optimizer.DEFAULT_RULE}.safetensors")
    identities = set()
    for choice in (None, rule, learned_optimizer.DEFAULT_RULE, path, str(path)):
        optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))], choice)
        identities.add(optimizer.param_groups[0]["rule"])
    assert identities == {f"lstm-{files.fingerprint(rule)}"}


def test_given_rule_is_copied_and_frozen_but_not_changed() -> None:
    rule = RULES["sgd"](lr=0.1)
    p = nn.Parameter(torch.ones(1))
    optimizer = LearnedOptimizer([p], rule)
    assert all(weight.requires_grad for weight in rule.parameters())
    assert not any(weight.requires_grad for weight in optimizer.rule.parameters())
    rule.lr.data.fill_(100.0)
    step_with(optimizer, p, [torch.ones(1)])
    assert_close(p, torch.tensor([0.9]))


# -- gradients, closures, loss ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:rule 'unit_norm' reads the training loss")
def test_loss_reaches_rules_that_read_it_from_closure_or_argument() -> None:
    grads, moved = torch.ones(4), {}
    for name, loss in {"none": None, "number": 2.0, "tensor": torch.tensor(2.0, requires_grad=True)}.items():
        p = nn.Parameter(torch.zeros(4))
        p.grad = grads
        assert LearnedOptimizer([p], UnitNorm(0.1, reads_loss=True)).step(loss=loss) is None
        moved[name] = p.norm().item()
    p = nn.Parameter(torch.zeros(4))
    p.grad = grads
    LearnedOptimizer([p], UnitNorm(0.1, reads_loss=True)).step(lambda: 2.0)
    moved["closure"] = p.norm().item()
    expected = {"none": 0.1, "number": 0.3, "tensor": 0.3, "closure": 0.3}
    assert moved == pytest.approx(expected, rel=1e-5)


# -- memory ----------------------------------------------------------------------------------------


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest memory that an operation made while the mode was on."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("name", "numbers"), [("sgd", 1), ("linear", 8), ("nadamw", 1)])
def test_step_on_ten_million_parameters_allocates_no_more_than_chunks(name: str, numbers: int) -> None:
    """`numbers`: fp32 numbers per coordinate in the rule's widest intermediate."""
    p = nn.Parameter(torch.ones(10_000_000))
    p.grad = torch.ones(10_000_000)
    optimizer = LearnedOptimizer([p], RULES[name]())
    optimizer.step()
    own = [p.detach(), p.grad, *optimizer.state[p].values()]
    with LargestAllocation(*own) as allocation:
        optimizer.step()
    assert 0 < allocation.largest <= numbers * chunked.CPU_CHUNK < 4 * p.numel()


@pytest.mark.parametrize("name", ["adamw", "small_fc", "celo"])
def test_step_of_many_small_tensors_needs_no_memory_of_the_models_size(name: str) -> None:
    peaks = []
    for number in (100, 300):
        params = [nn.Parameter(torch.ones(64, 64)) for _ in range(number)]
        for p in params:
            p.grad = torch.ones(64, 64)
        optimizer = LearnedOptimizer(params, RULES[name](), num_steps=10)
        optimizer.step(loss=1.0)
        held = [*params, *(p.grad for p in params if p.grad is not None)]
        held += [x for state in optimizer.state.values() for x in state.values()]
        peaks.append(measure_allocations(partial(optimizer.step, loss=1.0), held, torch.device("cpu"))[0])
    assert peaks[1] < 1.3 * peaks[0]


def test_chunks_shrink_with_the_state_of_a_coordinate() -> None:
    lengths = {}
    for name in ("sgd", "adam", "lstm"):
        p = torch.ones(100_000)
        lengths[name] = chunked.chunk_length(p, RULES[name]().init_state({"": p}).accumulators[""])
    assert lengths == {"sgd": 262144, "adam": 131072, "lstm": 6144}


# -- order -----------------------------------------------------------------------------------------


def test_result_does_not_depend_on_how_parameters_are_grouped(rule: Rule) -> None:
    results = []
    for order in ((0, 1), (1, 0)):
        params = [nn.Parameter(draw(i, 6)) for i in range(2)]
        optimizer = LearnedOptimizer([{"params": [params[i]]} for i in order], rule)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = draw(10 * step + i, 6)
            optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# -- the package -----------------------------------------------------------------------------------


def test_package_offers_what_it_lists() -> None:
    for name in lopt.__all__:
        if name != "Trainer":
            assert getattr(lopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lopt.nothing  # noqa: B018
