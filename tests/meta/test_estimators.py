"""Meta-gradients: against finite differences, against the naive graph, against each other."""

from __future__ import annotations

import gc

import pytest
import torch
from estimator_cases import Negative, Trap, constant, flatten
from torch import Tensor
from torch.func import functional_call, vmap

from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.estimators.bookkeeping import are_finite
from lopt.meta.trainer.memory_plan import PeakMemory
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, Rule
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.base import Batch, Task


def estimate_once(name: str, rule: Rule, family: TaskFamily, tasks: int = 4, **options: object) -> Estimate:
    estimator = ESTIMATORS[name](**options)
    horizon = constant(options["num_steps"])  # type: ignore[arg-type]
    loop = InnerLoop(rule, family, 0, horizon)
    slots = estimator.start(loop, torch.arange(tasks))
    return estimator.estimate(loop, slots._replace(horizon=horizon(slots.ids)))


class Double(TaskFamily):
    """Quadratics in float64, for finite differences."""

    name = "double"

    def __init__(self) -> None:
        super().__init__()
        self.inner = TASKS["quadratic"](dim=4)

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return {k: v.double() for k, v in self.inner.sample(generator, pool).items()}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {k: v.double() for k, v in self.inner.init(task, generator).items()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return tasks

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.inner.loss(params, batch)


def test_second_order_full_gradient_equals_finite_differences() -> None:
    family, tasks, steps = Double(), 2, 3
    rule = RULES["lstm"](hidden=3).double()
    gradient = flatten(estimate_once("full", rule, family, tasks, num_steps=steps, order=2).gradient)
    weights = {k: p.detach() for k, p in rule.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    directions = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in weights.items()}

    def meta_loss(h: float) -> Tensor:
        moved = {k: (w + h * directions[k]).expand(tasks, *w.shape) for k, w in weights.items()}
        loop = InnerLoop(rule, family, 0, constant(steps), meta_weights=moved)
        return loop.unroll(loop.start(torch.arange(tasks)), steps, restart=False).losses.mean()

    h = 1e-6
    slope = (meta_loss(h) - meta_loss(-h)) / (2 * h)
    torch.testing.assert_close((gradient * flatten(directions)).sum(), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["lstm", "rnnprop", "linear", "adam", "nadamw"])
def test_first_order_gradient_equals_the_naive_graph_with_constant_gradients(name: str) -> None:
    family, tasks, steps = Double(), 2, 4
    rule = RULES[name]().double()
    estimate = estimate_once("full", rule, family, tasks, num_steps=steps)
    slots = InnerLoop(rule, family, 0, constant(steps)).start(torch.arange(tasks))

    params = {"x": slots.params}
    state, losses = rule.init_state(params, 1), []
    for _ in range(steps):
        at = {"x": params["x"].detach().requires_grad_()}
        (grad,) = torch.autograd.grad(vmap(family.loss)(at, slots.task).sum(), [at["x"]])
        params, state = rule.update({"x": grad}, params, state)
        losses.append(vmap(family.loss)(params, slots.task))
    weights = list(rule.parameters())
    naive = torch.autograd.grad(torch.stack(losses).mean(), weights, allow_unused=True)
    expected = torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(naive, weights, strict=True)]
    )
    difference = (flatten(estimate.gradient) - expected).norm() / expected.norm()
    assert difference < 1e-6
    assert abs(estimate.metrics["loss"] - torch.stack(losses).mean().item()) < 1e-6 * estimate.metrics["loss"]


def test_orders_differ_where_the_gradient_depends_on_the_parameters() -> None:
    rule = RULES["sgd"](lr=0.02)
    first, second = (
        flatten(estimate_once("full", rule, TASKS["quadratic"](), num_steps=5, order=order).gradient)
        for order in (1, 2)
    )
    assert (first - second).norm() > 0.01 * second.norm()


@pytest.mark.parametrize("order", [1, 2])
def test_truncated_gradient_equals_full_gradient_when_window_covers_the_run(order: int) -> None:
    rule = RULES["lstm"](hidden=5)
    full, truncated = (
        flatten(estimate_once(name, rule, TASKS["quadratic"](), num_steps=6, order=order).gradient)
        for name in ("full", "truncated")
    )
    torch.testing.assert_close(truncated, full, rtol=1e-6, atol=0)


def test_a_short_window_is_biased() -> None:
    rule = RULES["lstm"](hidden=5)
    family = TASKS["quadratic"]()
    full = flatten(estimate_once("full", rule, family, num_steps=8).gradient)
    estimator = ESTIMATORS["truncated"](num_steps=2)
    loop = InnerLoop(rule, family, 0, constant(8))
    slots = estimator.start(loop, torch.arange(4))._replace(horizon=torch.full((4,), 8))
    total = torch.zeros_like(full)
    for _ in range(4):
        estimate = estimator.estimate(loop, slots)
        slots, total = estimate.carry, total + flatten(estimate.gradient) / 4
    assert (total - full).norm() > 0.05 * full.norm()


@pytest.mark.parametrize("options", [{"task_chunk": 3}, {"task_chunk": 1}, {"checkpoint": "update"}])
def test_ways_of_computing_do_not_change_the_gradient(options: dict[str, object]) -> None:
    rule = RULES["rnnprop"]()
    plain = estimate_once("truncated", rule, TASKS["quadratic"](), 8, num_steps=5)
    other = estimate_once("truncated", rule, TASKS["quadratic"](), 8, num_steps=5, **options)
    difference = flatten(plain.gradient) - flatten(other.gradient)
    assert difference.norm() < 1e-5 * flatten(plain.gradient).norm()  # float32, sums in another order
    torch.testing.assert_close(plain.carry.params, other.carry.params, rtol=1e-5, atol=1e-8)
    assert abs(plain.metrics["loss"] - other.metrics["loss"]) < 1e-5 * plain.metrics["loss"]


@pytest.mark.slow
def test_a_compiled_update_does_not_change_the_gradient() -> None:
    rule = RULES["lstm"]()
    plain, compiled = (
        flatten(estimate_once("truncated", rule, TASKS["quadratic"](), num_steps=5, compile=c).gradient)
        for c in (False, True)
    )
    assert (plain - compiled).norm() < 1e-4 * plain.norm()


class BrittleSGD(type(RULES["sgd"]())):  # type: ignore[misc]
    """SGD whose meta-derivative is 0 / 0 where parameters are large."""

    def policy(self, g: Tensor, p: Tensor, acc: Params, step: Tensor, progress: Tensor | None) -> tuple[Tensor, Params]:
        delta, acc = super().policy(g, p, acc, step, progress)
        return delta + 0 * (self.lr * (p.abs().amax(-1, keepdim=True) < 5)).sqrt(), acc


@pytest.mark.parametrize("poison", ["loss", "gradient", "meta-gradient"])
@pytest.mark.parametrize("bad", [(1,), (0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_task_that_is_not_finite_is_dropped_counted_and_restarted(
    poison: str, bad: tuple[int, ...], chunk: int | None
) -> None:
    rule = BrittleSGD(lr=1e-3) if poison == "meta-gradient" else RULES["lstm"](hidden=4)
    family = Trap(poison, bad)
    family.spec  # draws one task for the shapes  # noqa: B018
    family.drawn = 0
    estimate = estimate_once("truncated", rule, family, 4, num_steps=5, task_chunk=chunk)
    assert estimate.metrics["skipped_slots"] == len(bad)
    assert flatten(estimate.gradient).isfinite().all()
    assert estimate.carry.ids.tolist() == [0, 1, 2, 3]
    assert estimate.carry.params.isfinite().all()
    assert estimate.carry.episode.tolist() == [1] * 4  # bad ones restarted early, good ones ended
    good = [i for i in range(4) if i not in bad]
    if not good:
        assert flatten(estimate.gradient).abs().max() == 0
        return
    estimator = ESTIMATORS["truncated"](num_steps=5)
    loop = InnerLoop(rule, TASKS["quadratic"](), 0, constant(5))
    alone = estimator.estimate(loop, loop.start(torch.tensor(good)))
    torch.testing.assert_close(flatten(estimate.gradient), flatten(alone.gradient), rtol=1e-4, atol=1e-9)


def test_numbers_whose_sum_is_infinite_are_finite() -> None:
    huge = torch.full((2, 3), 3e38)
    assert huge.sum().isinf()
    assert are_finite([huge, torch.zeros(2)])
    assert not are_finite([torch.zeros(2), torch.tensor([1.0, torch.nan])])
    assert not are_finite([torch.tensor([torch.inf]), torch.tensor([-torch.inf])])


def test_a_rule_that_diverges_everywhere_gives_a_zero_gradient() -> None:
    estimate = estimate_once("truncated", RULES["sgd"](lr=1e12), TASKS["quadratic"](), num_steps=10)
    assert estimate.metrics["skipped_slots"] == 4
    assert flatten(estimate.gradient).abs().max() == 0


@pytest.mark.parametrize("name", ["truncated", "full"])
@pytest.mark.parametrize("objective", ["mean", "sum", "log", "final"])
def test_objectives_are_what_they_say(name: str, objective: str) -> None:
    family, steps = TASKS["quadratic"](), 4
    rule = RULES["sgd"](lr=0.01)
    gradient = estimate_once(name, rule, family, num_steps=steps, objective=objective).gradient["lr"]
    loop = InnerLoop(rule, family, 0, constant(steps))
    losses = loop.unroll(loop.start(torch.arange(4)), steps, restart=False).losses
    value = {
        "mean": losses.mean(),
        "sum": losses.sum(0).mean(),
        "log": losses.log().mean(),
        "final": losses[-1].mean(),
    }[objective]
    (expected,) = torch.autograd.grad(value, [rule.lr])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


def test_negative_losses_keep_the_sign_of_the_gradient_when_normalized() -> None:
    rule, family = RULES["sgd"](lr=0.01), Negative()
    plain, normalized = (
        estimate_once("truncated", rule, family, 1, num_steps=4, normalize=n).gradient["lr"] for n in (False, True)
    )
    loop = InnerLoop(rule, family, 0)
    first = loop.start(torch.arange(1)).loss[0]
    assert first < 0
    assert plain < 0
    torch.testing.assert_close(normalized, plain / first.abs(), rtol=1e-5, atol=0)


def test_log_objective_refuses_negative_losses_and_names_another() -> None:
    with pytest.raises(ValueError, match=r"'log' needs losses above 0.*use 'mean'"):
        estimate_once("truncated", RULES["sgd"](lr=0.01), Negative(), num_steps=2, objective="log")


def test_normalize_weighs_every_task_by_its_first_loss() -> None:
    rule, family = RULES["sgd"](lr=0.01), TASKS["quadratic"]()
    gradient = estimate_once("truncated", rule, family, num_steps=4, normalize=True).gradient["lr"]
    loop = InnerLoop(rule, family, 0, constant(4))
    start = loop.start(torch.arange(4))
    losses = loop.unroll(start, 4, restart=False).losses
    (expected,) = torch.autograd.grad((losses / start.loss).mean(), [rule.lr], retain_graph=True)
    (unweighted,) = torch.autograd.grad(losses.mean(), [rule.lr])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
    assert (unweighted - gradient * start.loss.mean()).abs() > 0.01 * unweighted.abs()


def test_final_objective_counts_only_tasks_that_end_in_the_window() -> None:
    rule = RULES["sgd"](lr=0.01)
    loop = InnerLoop(rule, TASKS["quadratic"](), 0, constant(9))
    slots = loop.start(torch.arange(3))._replace(horizon=torch.tensor([3, 9, 9]))
    estimate = ESTIMATORS["truncated"](num_steps=4, objective="final").estimate(loop, slots)
    losses = loop.unroll(slots, 3).losses
    (expected,) = torch.autograd.grad(losses[2, 0] / 3, [rule.lr])
    torch.testing.assert_close(estimate.gradient["lr"], expected, rtol=1e-5, atol=0)
    assert estimate.metrics["finished_tasks"] == 1


def test_truncated_starts_staggered_and_full_does_not() -> None:
    loop = InnerLoop(RULES["sgd"](), TASKS["quadratic"](), 0, constant(40))
    assert ESTIMATORS["truncated"](num_steps=5).start(loop, torch.arange(16)).horizon.unique().numel() > 8
    assert ESTIMATORS["full"](num_steps=5).start(loop, torch.arange(16)).horizon.unique().tolist() == [5]


@pytest.mark.parametrize(
    ("options", "share"),
    # two of eight tasks at a time, or one of ten steps at a time with the recurrent state of all
    [({"task_chunk": 2}, 0.4), ({"checkpoint": "update"}, 0.6)],
)
def test_ways_to_save_memory_save_memory(options: dict[str, object], share: float) -> None:
    rule, family = RULES["lstm"](), TASKS["quadratic"](dim=32)
    peaks = []
    for case in ({}, options):
        with PeakMemory() as memory:
            estimate_once("truncated", rule, family, 8, num_steps=10, **case)
        peaks.append(memory.peak)
    assert peaks[1] < share * peaks[0]


def test_held_out_objective_measures_other_data_and_leaves_the_training_alone() -> None:
    family = TASKS["mlp"](width=4, batch_size=8)
    rule = RULES["sgd"](lr=0.3)
    plain, held_out = (
        estimate_once("truncated", rule, family, 2, num_steps=3, objective_split=split)
        for split in ("train", "inner_valid")
    )
    assert torch.equal(plain.carry.params, held_out.carry.params)
    assert torch.equal(plain.carry.grad, held_out.carry.grad)
    loop = InnerLoop(rule, family, 0, constant(9), meta_split="inner_valid")
    slots, loss, _ = loop.step(loop.start(torch.arange(2)))
    (gradient,) = torch.autograd.grad(loss.sum(), [rule.lr])
    value, grad = loop.evaluate(slots.params, loop.batch(slots, "inner_valid"))
    assert torch.equal(loss, value)
    first = loop.start(torch.arange(2)).grad
    torch.testing.assert_close(gradient, -(grad * first).sum(), rtol=1e-5, atol=0)
    assert plain.gradient["lr"] != held_out.gradient["lr"]


def test_clamped_losses_have_no_gradient() -> None:
    rule = RULES["sgd"](lr=1.0)  # diverges on every quadratic
    free = estimate_once("truncated", rule, TASKS["quadratic"](), num_steps=4, loss_clamp=1e30).gradient["lr"]
    clamped = estimate_once("truncated", rule, TASKS["quadratic"](), num_steps=4, loss_clamp=1e-3).gradient["lr"]
    assert free.abs() > 0
    assert clamped == 0


def test_imitation_pulls_towards_the_teacher() -> None:
    rule, teacher = RULES["sgd"](lr=0.01), RULES["sgd"](lr=0.02)
    options = {"num_steps": 4, "teacher": teacher, "follow": 1.0}
    without = estimate_once("truncated", rule, TASKS["quadratic"](), **options).gradient["lr"]
    with_it = estimate_once("truncated", rule, TASKS["quadratic"](), imitation=10.0, **options).gradient["lr"]
    assert without == 0  # tasks that follow the teacher do not depend on the rule
    assert with_it < 0  # a larger rate is nearer to the teacher


def test_live_memory_does_not_grow_over_outer_steps() -> None:
    rule, family = RULES["lstm"](hidden=4), TASKS["quadratic"]()
    estimator = ESTIMATORS["truncated"](num_steps=3)
    loop = InnerLoop(rule, family, 0, constant(7))
    slots = estimator.start(loop, torch.arange(3))

    def count_tensors() -> tuple[int, int]:
        gc.collect()
        live = [o for o in gc.get_objects() if type(o) is Tensor]
        return len(live), sum(t.untyped_storage().nbytes() for t in live)

    counts = []
    for step in range(60):
        slots = estimator.estimate(loop, slots).carry
        if step in (20, 59):
            counts.append(count_tensors())
    # What other tests have left may go in between.
    assert counts[1][0] <= counts[0][0]
    assert counts[1][1] <= counts[0][1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps.*0"),
        ({"objective": "median"}, "objective.*median"),
        ({"checkpoint": "step"}, "checkpoint.*step"),
        ({"task_chunk": 0}, "task_chunk"),
        ({"order": 2, "compile": True}, "order=2.*compile"),
        ({"order": 3}, "order.*3"),
        ({"follow": 0.5}, "teacher"),
        ({"objective_split": "dev"}, "inner_valid.*dev"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ESTIMATORS["truncated"](**options)  # type: ignore[arg-type]


def test_functional_call_reaches_the_update() -> None:
    rule = RULES["sgd"](lr=0.5)
    params = {"x": torch.ones(2)}
    new, _ = functional_call(rule, {"lr": torch.tensor(0.25)}, ({"x": torch.ones(2)}, params, rule.init_state(params)))
    assert new["x"].tolist() == [0.75, 0.75]
