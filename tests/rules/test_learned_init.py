"""Learned initialisations: against torch.func, against finite differences, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lopt.core.random import make_generator
from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.rules import RULES, LearnedInit
from lopt.rules.files import load, save
from lopt.rules.learned_init import FLAT
from lopt.tasks import TASKS, Batch, Task
from lopt.tasks.sinusoid import Sinusoid

SLOTS = torch.arange(3)


class Double(Sinusoid):
    """Sine waves in float64, on a small network."""

    def __init__(self, shots: int = 4, queries: int = 6, width: int = 5) -> None:
        super().__init__(shots, queries, width)

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        drawn = super().sample_all(seeds, pool)
        return {key: x.double() if x.is_floating_point() else x for key, x in drawn.items()}


def make_rule(
    family: Sinusoid, inner: str = "sgd", config: dict[str, Any] | None = None, **options: Any
) -> LearnedInit:
    generator = make_generator(5)
    params = family.init({}, generator)
    rule = LearnedInit({name: list(p.shape) for name, p in params.items()}, inner, config, **options)
    rule.set_initial(params)
    return rule


def make_full(num_steps: int, order: int = 2, **options: Any) -> Any:
    given = {"objective": "final", "objective_split": "inner_valid", "loss_clamp": 1e9} | options
    return ESTIMATORS["full"](num_steps=num_steps, order=order, **given)


def measure(rule: LearnedInit, family: Sinusoid, num_steps: int, **options: Any) -> tuple[float, Params]:
    """Objective and meta-gradient."""
    loop, full = InnerLoop(rule, family, 0), make_full(num_steps, **options)
    estimate = full.estimate(loop, full.start(loop, SLOTS))
    assert estimate.num_tasks == len(SLOTS)
    return estimate.metrics["objective"], estimate.gradient


def differentiate_by_hand(rule: LearnedInit, family: Sinusoid, num_steps: int, order: int, lr: float) -> Params:
    """MAML as anybody writes it with torch.func."""
    loop = make_full(num_steps).configure(InnerLoop(rule, family, 0))
    slots = loop.start(SLOTS)
    support, query = loop.batch(slots), loop.batch(slots, "inner_valid")

    def loss(params: Params, batch: Batch) -> Tensor:
        return F.mse_loss(functional_call(family.batched.module, params, (batch["x"],)), batch["y"])

    def adapt(params: Params, support: Batch, query: Batch) -> Tensor:
        for _ in range(num_steps):
            grads = grad(loss)(params, support)
            grads = {k: g.detach() if order == 1 else g for k, g in grads.items()}
            params = {k: p - lr * grads[k] for k, p in params.items()}
        return loss(params, query)

    start = {k: p.detach() for k, p in rule.initial_params.items()}
    return grad(lambda p: vmap(adapt, in_dims=(None, 0, 0))(p, support, query).mean())(start)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_maml_and_its_first_order_form_equal_torch_func(num_steps: int, order: int) -> None:
    family = Double()
    rule = make_rule(family, config={"lr": 0.02}).double()
    _, found = measure(rule, family, num_steps, order=order)
    lr = rule.inner.lr.item()
    for name, expected in differentiate_by_hand(rule, family, num_steps, order, lr).items():
        torch.testing.assert_close(found[f"init.{name}"], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(
    ("inner", "config", "options"),
    [
        ("sgd", {"lr": 0.02}, {}),
        ("sgd", {"lr": 1.0}, {"rates": "element", "rate": 0.03}),
        ("sgd", {"lr": 0.02}, {"rates": "tensor", "adapt": ["4.*", "2.*"]}),
        ("sgd", {"lr": 1.0}, {"rates": "matrix", "rate": 0.03, "adapt": ["2.*", "0.weight"]}),
        ("sgd", {"lr": 1.0}, {"rates": "low_rank", "rate": 0.03, "rank": 3, "adapt": ["2.*", "0.weight"]}),
        ("adam", {"lr": 0.02}, {}),
        ("lstm", {"hidden": 4, "output_scale": 0.1}, {}),
        ("rnnprop", {"hidden": 4}, {"rates": "element"}),
        ("small_fc", {"hidden": 4}, {"rates": "tensor"}),
        ("small_fc", {"hidden": 4}, {"rates": "matrix"}),
        ("small_fc", {"hidden": 4}, {"rates": "low_rank", "rank": 3}),
    ],
)
def test_second_order_equals_finite_differences(
    inner: str, config: dict[str, Any], options: dict[str, Any], num_steps: int
) -> None:
    family = Double()
    rule = make_rule(family, inner, config, **options).double()
    _, gradient = measure(rule, family, num_steps)
    generator, h = make_generator(1), 1e-6
    for name, weight in rule.meta_weights().items():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        ends = []
        for side in (h, -2 * h, h):
            weight.data += side * direction
            ends.append(measure(rule, family, num_steps)[0])
        slope = float((gradient[name] * direction).sum())
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-6, abs=1e-8), name


def test_a_step_of_zero_rate_leaves_the_initialisation_where_it_is() -> None:
    family = Sinusoid(shots=4, width=5)
    rule = make_rule(family, rates="element", rate=0.0)
    loop = make_full(3).configure(InnerLoop(rule, family, 0))
    window = loop.unroll(loop.start(SLOTS), 3, restart=False)
    expected = family.spec.flatten(rule.initial_params).detach()
    assert torch.equal(window.slots.params, expected.expand(3, -1))


def test_a_single_number_has_a_rate_of_its_own() -> None:
    rule = LearnedInit({"w": [2], "b": []}, "sgd", {"lr": 0.5}, rates="tensor")
    with torch.no_grad():
        rule.get_parameter("rates.w").fill_(2)
        rule.get_parameter("rates.b").fill_(3)
    params = {"w": torch.zeros(2), "b": torch.zeros(())}
    moved, _ = rule.update({"w": torch.ones(2), "b": torch.ones(())}, params, rule.init_state(params))
    assert moved["w"].tolist() == [-1, -1]
    assert moved["b"].item() == -1.5
    flat = {FLAT: torch.zeros(4, 3)}
    together, _ = rule.update({FLAT: torch.ones(4, 3)}, flat, rule.init_state(flat, 1))
    assert together[FLAT].tolist() == [[-1, -1, -1.5]] * 4


SHAPES = {"w": [3, 2], "kernel": [2, 3, 2, 2], "row": [1, 4], "b": [3], "s": [], "one": [1, 1], "none": [0, 2]}


def test_matrices_act_on_every_side_of_a_step() -> None:
    rule = LearnedInit(SHAPES, "sgd", {"lr": 1.0}, rates="matrix", adapt=["[!b]*"]).double()
    generator = make_generator(2)
    params = {k: torch.zeros(5, *shape, dtype=torch.float64) for k, shape in SHAPES.items()}
    grads = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in params.items()}
    same, _ = rule.update(grads, params, rule.init_state(params, 1))
    assert all(torch.equal(same[k], -g) for k, g in grads.items() if k != "b")  # identities at first
    m = {k: w.data.normal_(generator=generator) for k, w in rule.named_parameters() if k.startswith("rates.")}
    moved, _ = rule.update(grads, params, rule.init_state(params, 1))
    kernel = grads["kernel"].flatten(3)
    expected = {
        "w": torch.einsum("ai,bj,tij->tab", m["rates.w.0"], m["rates.w.1"], grads["w"]),
        "kernel": torch.einsum("ai,bj,ck,tijk->tabc", *(m[f"rates.kernel.{i}"] for i in range(3)), kernel).view(
            5, 2, 3, 2, 2
        ),
        "row": torch.einsum("ai,toi->toa", m["rates.row.0"], grads["row"]),
        "b": torch.zeros(5, 3, dtype=torch.float64),
        "s": m["rates.s.0"][0, 0] * grads["s"],
        "one": m["rates.one.0"] * grads["one"],
        "none": grads["none"],
    }
    for name, step in expected.items():
        torch.testing.assert_close(-moved[name], step, rtol=1e-12, atol=1e-12)
    flat = {FLAT: torch.zeros(5, sum(p[0].numel() for p in params.values()), dtype=torch.float64)}
    joined = {FLAT: torch.cat([g.reshape(5, -1) for g in grads.values()], 1)}
    together, _ = rule.update(joined, flat, rule.init_state(flat, 1))
    torch.testing.assert_close(together[FLAT], torch.cat([p.reshape(5, -1) for p in moved.values()], 1))


def test_low_rank_multiplies_all_parameters_by_one_matrix() -> None:
    rule = LearnedInit(SHAPES, "sgd", {"lr": 1.0}, rates="low_rank", rate=0.3, rank=2, adapt=["[!b]*"]).double()
    generator = make_generator(2)
    params = {k: torch.zeros(5, *shape, dtype=torch.float64) for k, shape in SHAPES.items()}
    grads = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in params.items()}
    same, _ = rule.update(grads, params, rule.init_state(params, 1))
    assert all(torch.allclose(same[k], -0.3 * g) for k, g in grads.items() if k != "b")  # rates of elements at first

    def place(part: str, rows: int) -> Tensor:
        """A part of the rates where all parameters are one vector, drawn anew; 0 for those that are not adapted."""
        pieces = []
        for name, p in params.items():
            drawn = torch.randn(rows, p[0].numel(), generator=generator, dtype=torch.float64) * (name != "b")
            if name != "b":
                weight = rule.get_parameter(f"rates.{name}.{part}")
                weight.data.copy_(drawn.reshape(weight.shape))
            pieces.append(drawn)
        return torch.cat(pieces, 1)

    matrix = torch.diag(place("factor", 1)[0]) + place("write", 2).T @ place("read", 2)
    moved, _ = rule.update(grads, params, rule.init_state(params, 1))
    joined = torch.cat([g.reshape(5, -1) for g in grads.values()], 1)
    found = torch.cat([p.reshape(5, -1) for p in moved.values()], 1)
    torch.testing.assert_close(found, -joined @ matrix.T, rtol=1e-12, atol=1e-12)
    flat = {FLAT: torch.zeros_like(joined)}
    together, _ = rule.update({FLAT: joined}, flat, rule.init_state(flat, 1))
    torch.testing.assert_close(together[FLAT], found)


def test_a_parameter_may_have_the_name_of_all_in_one_vector() -> None:
    rule = LearnedInit({FLAT: [2], "w": [3]}, "sgd", {"lr": 1.0}, rates="low_rank", rate=0.5)
    params, grads = ({FLAT: torch.full((2,), x), "w": torch.full((3,), x)} for x in (0.0, 1.0))
    moved, _ = rule.update(grads, params, rule.init_state(params))
    assert {name: p.tolist() for name, p in moved.items()} == {FLAT: [-0.5] * 2, "w": [-0.5] * 3}


def test_parameters_that_are_not_adapted_stay_and_the_others_move() -> None:
    family = Sinusoid(shots=4, width=5)
    rule = make_rule(family, config={"lr": 0.1}, adapt=["4.*"])
    loop = make_full(2).configure(InnerLoop(rule, family, 0))
    after = family.spec.unflatten(loop.unroll(loop.start(SLOTS), 2, restart=False).slots.params)
    for name, start in rule.initial_params.items():
        same = torch.equal(after[name], start.detach().expand_as(after[name]))
        assert same == (not name.startswith("4."))


@pytest.mark.parametrize("inner", ["sgd", "small_fc"])
@pytest.mark.parametrize("rates", ["tensor", "element", "matrix", "low_rank"])
def test_weights_of_each_slot_do_as_a_rule_of_their_own(inner: str, rates: str) -> None:
    family = Double()
    config = {"hidden": 4} if inner == "small_fc" else {"lr": 0.1}
    rules = [make_rule(family, inner, config, rates=rates, rate=0.5).double() for _ in range(3)]
    generator = make_generator(3)
    for rule in rules:
        for weight in rule.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data += 0.1 * weight.abs() * noise
    stacked = {
        k: torch.stack([dict(r.named_parameters())[k].detach() for r in rules]) for k, _ in rules[0].named_parameters()
    }
    with torch.no_grad():
        together = make_full(2).configure(InnerLoop(rules[0], family, 0, meta_weights=stacked))
        window = together.unroll(together.start(SLOTS), 2, restart=False)
        for slot, rule in enumerate(rules):
            alone = make_full(2).configure(InnerLoop(rule, family, 0))
            expected = alone.unroll(alone.start(SLOTS[slot : slot + 1]), 2, restart=False)
            torch.testing.assert_close(window.losses[:, slot], expected.losses[:, 0], rtol=1e-12, atol=0)


def test_evolution_finds_the_direction_of_the_meta_gradient() -> None:
    family = Double()
    rule = make_rule(family, config={"lr": 0.02}).double()
    for weight in rule.inner.parameters():
        weight.requires_grad_(False)
    loop, ids = InnerLoop(rule, family, 0), torch.arange(4000)
    options = {"num_steps": 2, "objective": "final", "objective_split": "inner_valid", "loss_clamp": 1e9}
    estimator = ESTIMATORS["full_es"](sigma=0.01, **options)
    found = estimator.estimate(loop, estimator.start(loop, ids)).gradient
    exact = ESTIMATORS["full"](order=2, **options)
    expected = exact.estimate(loop, exact.start(loop, ids)).gradient
    a, b = (torch.cat([g[key].flatten() for key in expected]) for g in (found, expected))
    assert torch.cosine_similarity(a, b, dim=0) > 0.8


def test_the_clamp_is_of_the_recorded_split_at_the_start() -> None:
    """A start that fits the support of a task well must not cut the losses of its queries."""
    family = Sinusoid(shots=1, queries=5, width=5)
    rule = make_rule(family)
    loop = make_full(1).configure(InnerLoop(rule, family, 0))
    slots = loop.start(SLOTS)
    window = loop.unroll(slots, 1, restart=False)
    start = {k: p.detach().expand(3, *p.shape) for k, p in rule.initial_params.items()}
    torch.testing.assert_close(window.first_loss[0], family.losses(start, loop.batch(slots, "inner_valid")))


def test_tasks_begin_with_the_weights_of_the_window_and_not_of_the_one_before() -> None:
    family = Sinusoid(shots=4, width=5)
    rule, full = make_rule(family, rates="element", rate=0.0), make_full(1, loss_clamp=1e9)
    loop = InnerLoop(rule, family, 0)
    carry = full.estimate(loop, full.start(loop, SLOTS)).carry
    with torch.no_grad():
        rule.initial_params["4.bias"] += 100
    assert full.estimate(loop, carry).metrics["objective"] > 5000


def test_truncated_windows_go_on_where_they_were_and_new_tasks_begin_at_the_start() -> None:
    family = Sinusoid(shots=4, width=5)
    rule = make_rule(family, config={"lr": 0.01})
    loop = InnerLoop(rule, family, 0, horizon=lambda seeds: torch.full_like(seeds, 3))
    whole = loop.unroll(loop.start(SLOTS), 5).losses.detach()
    slots, parts = loop.start(SLOTS), []
    for steps in (2, 2, 1):
        window = loop.unroll(slots, steps)
        slots = window.slots
        parts.append(window.losses.detach())
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rates", ["element", "matrix", "low_rank"])
def test_a_file_holds_all_of_it(rates: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rates": rates, "rate": 0.3, "adapt": ["4.*", "0.weight"]}
    rule = make_rule(Sinusoid(width=5), "rnnprop", {"hidden": 4}, **options)
    again = load(save(rule, tmp_path / "rule.safetensors"))
    assert isinstance(again, LearnedInit)
    assert again.config == rule.config
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in rule.state_dict().items())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LearnedInit({"w": [2]}, "sdg"), "sdg.*no such rule.*sgd"),
        (lambda: LearnedInit({"w": [2]}, "sgd", {"rate": 1.0}), "inner_config.*rate"),
        (lambda: LearnedInit({"w": [2]}, adapt=["v"]), "'v' fits no parameter"),
        (lambda: LearnedInit({"w": [2]}, rates="elements"), "rates.*element"),
        (lambda: LearnedInit({"w": [2]}, rates="low_rank", rank=0), "rank must be at least 1, got 0"),
        (lambda: LearnedInit({}), "name the parameters"),
        (lambda: LearnedInit({"x": [3]}).set_initial({"x": torch.zeros(4)}), r"'x' is \[3\] there and \[4\] here"),
        (lambda: InnerLoop(LearnedInit({"y": [3]}), TASKS["quadratic"](dim=3), 0), r"'y' is \[3\] there and nothing"),
        (
            lambda: InnerLoop(LearnedInit({"2.bias": [1], "0.weight": [5, 1]}), Sinusoid(width=5), 0),
            "another model",
        ),
    ],
)
def test_refusals_name_what_was_found(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_it_is_no_optimizer_for_any_model() -> None:
    rule = make_rule(Sinusoid(width=5))
    with pytest.raises(ValueError, match=r"one model.*lopt\.adapt"):
        LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], rule)


def test_it_has_no_name_among_the_rules_for_any_model() -> None:
    assert LearnedInit.name not in RULES
