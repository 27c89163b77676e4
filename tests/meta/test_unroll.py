"""The inner loop: slots are independent, restarts are exact, orders and checkpointing agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.rule_calls import compile_rule
from lopt.meta.unroll.slots import Slots, Window, join_slots, select_slots
from lopt.rules import RULES, Clock, Decision, Elements, Layout, Rule, State, Visit
from lopt.rules.stages import AllTensors
from lopt.tasks import TASKS

ROWS = 1e-5  # float32, sums over ten numbers in another order


def constant(steps: int):  # type: ignore[no-untyped-def]
    return lambda seeds: torch.full_like(seeds, steps)


def flatten_tree(tree: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


def test_a_slot_does_the_same_alone_and_in_company() -> None:
    loop = InnerLoop(RULES["rnnprop"](), TASKS["quadratic"](), 3, constant(4))
    together = loop.unroll(loop.start(torch.arange(5)), 6)
    alone = loop.unroll(loop.start(torch.tensor([3])), 6)
    torch.testing.assert_close(together.losses[:, 3:4], alone.losses, rtol=ROWS, atol=0)
    torch.testing.assert_close(together.slots.params[3:4], alone.slots.params, rtol=ROWS, atol=1e-7)


def test_two_windows_equal_one_long_window() -> None:
    loop = InnerLoop(RULES["lstm"](), TASKS["quadratic"](), 0, constant(5))
    start = loop.start(torch.arange(3), stagger=True)
    long = loop.unroll(start, 12)
    first = loop.unroll(start, 7)
    second = loop.unroll(first.slots, 5)
    assert torch.equal(long.losses, torch.cat([first.losses, second.losses]))
    assert all(torch.equal(a, b) for a, b in zip(flatten_tree(long.slots), flatten_tree(second.slots), strict=True))


def test_unroll_leaves_its_slots_as_they_were() -> None:
    loop = InnerLoop(RULES["adam"](), TASKS["quadratic"](), 0, constant(3))
    slots = loop.start(torch.arange(3))
    before = [x.clone() for x in flatten_tree(slots)]
    loop.unroll(slots, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, flatten_tree(slots), strict=True))
    assert not any(x.requires_grad for x in flatten_tree(slots))


def test_a_horizon_may_be_one_number_for_all_tasks() -> None:
    rule, family = RULES["sgd"](lr=0.01), TASKS["quadratic"]()
    number, drawn = (InnerLoop(rule, family, 0, horizon) for horizon in (3, constant(3)))
    one, other = number.unroll(number.start(torch.arange(2)), 4), drawn.unroll(drawn.start(torch.arange(2)), 4)
    assert one.finished.tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert all(torch.equal(a, b) for a, b in zip(flatten_tree(one), flatten_tree(other), strict=True))


def test_a_finished_slot_restarts_alone_with_a_new_task() -> None:
    horizons = torch.tensor([2, 7])
    loop = InnerLoop(RULES["sgd"](lr=0.01), TASKS["quadratic"](), 0, lambda seeds: horizons[: len(seeds)])
    start = loop.start(torch.arange(2))
    window = loop.unroll(start, 3)
    assert window.finished.tolist() == [[False, False], [True, False], [False, False]]
    assert window.slots.episode.tolist() == [1, 0]
    assert window.slots.step.tolist() == [1, 3]
    assert not torch.equal(window.slots.task["W"][0], start.task["W"][0])
    assert torch.equal(window.slots.task["W"][1], start.task["W"][1])
    fresh = loop.restart(torch.tensor([0]), torch.tensor([1]))
    assert torch.equal(window.first_loss[2, :1], fresh.loss)
    assert window.slots.state.step.tolist() == [1, 3]


def test_no_gradient_crosses_a_restart() -> None:
    rule = RULES["sgd"](lr=0.05)
    loop = InnerLoop(rule, TASKS["quadratic"](), 0, constant(2))
    window = loop.unroll(loop.start(torch.arange(2)), 3)
    (gradient,) = torch.autograd.grad(window.losses[2].sum(), [rule.lr])
    # The third loss is one SGD step from fresh parameters: dL/dlr = -g1 . g0 of the new task alone.
    slots = loop.restart(torch.arange(2), torch.ones(2, dtype=torch.int64))
    after, _, _ = loop.step(slots)
    torch.testing.assert_close(gradient, -(slots.grad * after.grad).sum(), rtol=1e-5, atol=0)


def test_staggered_slots_end_at_different_times_within_their_horizon() -> None:
    loop = InnerLoop(RULES["sgd"](), TASKS["quadratic"](), 0, constant(50))
    horizons = loop.start(torch.arange(64), stagger=True).horizon
    assert horizons.min() >= 1
    assert horizons.max() <= 50
    assert horizons.unique().numel() > 25


def test_checkpointing_changes_no_number() -> None:
    gradients = []
    for checkpoint in (False, True):
        rule = RULES["lstm"](hidden=4)
        loop = InnerLoop(rule, TASKS["quadratic"](), 0, constant(9), checkpoint="update" if checkpoint else None)
        window = loop.unroll(loop.start(torch.arange(2)), 6)
        gradients.append(torch.autograd.grad(window.losses.mean(), list(rule.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_set_of_meta_weights_per_slot_equals_one_rule_per_slot() -> None:
    rates = torch.tensor([0.003, 0.01, 0.03])
    rule = RULES["adam"]()
    weights = {k: p.detach().expand(3) for k, p in rule.named_parameters()} | {"lr": rates}
    index = torch.zeros(3, dtype=torch.int64)
    loop = InnerLoop(rule, TASKS["quadratic"](), 0, constant(9), meta_weights=weights)
    together = loop.unroll(loop.start(index), 8).losses
    for i, rate in enumerate(rates.tolist()):
        single = InnerLoop(RULES["adam"](lr=rate), TASKS["quadratic"](), 0, constant(9))
        alone = single.unroll(single.start(index[:1]), 8).losses
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=ROWS, atol=0)


def test_followed_tasks_take_the_teachers_steps_and_measure_the_distance() -> None:
    teacher = RULES["adam"](lr=0.05)
    taught = InnerLoop(RULES["lstm"](), TASKS["quadratic"](), 0, constant(9), teacher=teacher, follow=1.0)
    plain = InnerLoop(teacher, TASKS["quadratic"](), 0, constant(9))
    window = taught.unroll(taught.start(torch.arange(4)), 8)
    expected = plain.unroll(plain.start(torch.arange(4)), 8)
    torch.testing.assert_close(window.losses, expected.losses, rtol=ROWS, atol=0)
    assert (window.imitation > 0).all()
    own = InnerLoop(teacher, TASKS["quadratic"](), 0, constant(9), teacher=RULES["adam"](lr=0.05), follow=0.5)
    assert own.unroll(own.start(torch.arange(4)), 8).imitation.abs().max() < 1e-12


@pytest.mark.parametrize("teacher", ["momentum", "adam"])
def test_followed_tasks_take_the_same_steps_in_both_orders(teacher: str) -> None:
    losses = []
    for order in (1, 2):
        options = {"order": order, "teacher": RULES[teacher](lr=0.01), "follow": 1.0}
        loop = InnerLoop(RULES["lstm"](hidden=3), TASKS["quadratic"](), 0, constant(9), **options)
        losses.append(loop.unroll(loop.start(torch.arange(3)), 6).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=ROWS, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_a_held_out_objective_leaves_loss_and_gradient_of_the_slots_to_the_train_data(order: int) -> None:
    family = TASKS["mlp"](width=3, batch_size=8)
    loop = InnerLoop(RULES["sgd"](lr=0.3), family, 0, constant(9), order=order, meta_split="inner_valid")
    slots = loop.start(torch.arange(2))
    for _ in range(2):
        slots, recorded, _ = loop.step(slots)
        loss, grad = loop.evaluate(slots.params, loop.batch(slots, "train"))
        assert torch.equal(slots.loss, loss)
        assert torch.equal(slots.grad, grad)
        assert not torch.equal(recorded.detach(), loss)


class Spy(type(RULES["sgd"]())):  # type: ignore[misc]
    """SGD that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(lr=0.01)
        self.heard: list[tuple[Tensor, Tensor]] = []

    def update(
        self, grads: Params, params: Params, state: State, loss: Tensor, num_steps: Tensor
    ) -> tuple[Params, State]:
        self.heard.append((loss, state.step / num_steps))
        return super().update(grads, params, state, loss, num_steps)


def test_the_rule_hears_the_present_loss_and_the_progress_of_every_slot() -> None:
    rule = Spy()
    horizons = torch.tensor([2, 4])
    loop = InnerLoop(rule, TASKS["quadratic"](), 0, lambda seeds: horizons[: len(seeds)])
    start = loop.start(torch.arange(2))
    window = loop.unroll(start, 3)
    assert torch.equal(rule.heard[0][0], start.loss)
    torch.testing.assert_close(rule.heard[1][0], window.losses[0].detach(), rtol=0, atol=0)
    # slot 0 is on a new task in the third step
    torch.testing.assert_close(rule.heard[2][0], torch.stack([window.first_loss[2, 0], window.losses[1, 1].detach()]))
    assert [progress.tolist() for _, progress in rule.heard] == [[0, 0], [0.5, 0.25], [0, 0.5]]


def test_selected_and_joined_slots_are_the_slots() -> None:
    loop = InnerLoop(RULES["lstm"](), TASKS["quadratic"](), 0, constant(9))
    slots = loop.start(torch.arange(4))
    again = join_slots([select_slots(slots, slice(0, 1)), select_slots(slots, torch.tensor([1, 2, 3]))])
    assert all(torch.equal(a, b) for a, b in zip(flatten_tree(slots), flatten_tree(again), strict=True))


def test_second_order_refuses_a_compiled_update() -> None:
    rule = RULES["lstm"]()
    with pytest.raises(ValueError, match=r"order=2.*compile"):
        InnerLoop(rule, TASKS["quadratic"](), 0, order=2, update=compile_rule(rule))


class LossScaled(Rule):
    """A gradient step times the loss."""

    name = "loss_scaled"
    needs_loss = True
    tensor_keys = ("count",)

    def __init__(self) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Params:
        return {"count": torch.zeros(*p.shape[: p.ndim - layout.ndim], 1)}

    def decide_together(self, tensors: AllTensors) -> tuple[Params, Params]:
        assert tensors.loss is not None
        return {}, {"size": self.lr * tensors.loss.expand(tensors.tensor_state["count"].shape[:-1])}

    def decide(self, means: object, acc: object, layout: Layout, clock: Clock, shared: Params) -> Decision:
        return Decision(decided=shared["size"].reshape(*shared["size"].shape, *[1] * layout.ndim))

    def move(self, e: Elements, decided: Tensor) -> Visit:
        return Visit(delta=-decided * e.g)


def test_second_order_goes_through_the_loss_that_the_rule_reads() -> None:
    rule, family = LossScaled(), TASKS["quadratic"](dim=3)

    def end() -> Tensor:
        loop = InnerLoop(rule, family, 0, constant(9), order=2)
        slots = loop.start(torch.arange(2))
        slots = slots._replace(params=slots.params.double(), task={k: v.double() for k, v in slots.task.items()})
        return loop.unroll(loop.measure_first(slots), 3).losses[-1].sum()

    (slope,) = torch.autograd.grad(end(), [rule.lr])
    h, ends = 1e-6, []
    for side in (h, -2 * h):
        rule.lr.data += side
        ends.append(end().detach())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=0)


def unroll_one_by_one(loop: InnerLoop, slots: Slots, num_steps: int) -> Window:
    """The definition: after every step, slots that are done start a new task."""
    rows: list[tuple[Tensor, ...]] = []
    weights = loop.find_weights(slots)
    for _ in range(num_steps):
        slots, loss, imitation = loop.step(slots, weights)
        done = slots.step >= slots.horizon
        rows.append(
            (loss, imitation, slots.first_loss, done, slots.episode, slots.step, torch.ones_like(done)),
        )
        if done.any():
            slots = loop.renew(slots, done)
            weights = loop.find_weights(slots)
    return Window(*map(torch.stack, zip(*rows, strict=True)), slots)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("num_steps", [1, 7, 12])
def test_strides_between_restarts_are_single_steps_to_the_bit(num_steps: int, grad: bool) -> None:
    def make_weights(slots: Slots) -> Params:  # they change with every restart
        return {"lr": 0.001 * (1 + slots.ids + 3 * slots.episode)}

    horizons = (1, 2, 5, 30)
    loop = InnerLoop(
        RULES["sgd"](),
        TASKS["quadratic"](),
        0,
        lambda seeds: torch.tensor(horizons)[seeds % len(horizons)],
        meta_weights=make_weights,
    )
    with torch.set_grad_enabled(grad):
        start = loop.start(torch.arange(6), stagger=True)
        start = start._replace(step=start.step + (start.ids == 5) * start.horizon)  # one is done already
        found, expected = loop.unroll(start, num_steps), unroll_one_by_one(loop, start, num_steps)
    assert expected.finished.any()
    for a, b in zip(flatten_tree(found), flatten_tree(expected), strict=True):
        assert torch.equal(a, b)


def test_a_share_of_tasks_hides_the_end_from_the_rule_until_then() -> None:
    """What is hidden is as if the optimizer's user had not given it: the rule's own updates, task by task."""
    rule, tasks, steps = RULES["base"](size=0.05, relative=4.0, init_std=0.3), 6, 5
    loop = InnerLoop(rule, TASKS["quadratic"](dim=3), 3, hide_end=0.5)
    with torch.no_grad():
        start = loop.start(torch.arange(tasks))
        window = loop.unroll(start, steps, restart=False)
        hidden = loop.draws.hides_end(start, 0.5).tolist()
        assert 0 < sum(hidden) < tasks
        for i in range(tasks):
            one = select_slots(start, slice(i, i + 1))
            for step in range(steps):
                end = None if hidden[i] else one.horizon
                params, state = rule.update(
                    loop.family.spec.unflatten(one.grad),
                    loop.family.spec.unflatten(one.params),
                    one.state,
                    one.loss,
                    end,
                )
                one = one._replace(step=one.step + 1, params=loop.family.spec.flatten(params), state=state)
                value, grad = loop.evaluate(one.params, loop.batch(one))
                one = one._replace(loss=value, grad=grad)
                torch.testing.assert_close(window.losses[step, i], value[0], rtol=1e-5, atol=1e-8)


def test_hiding_the_end_from_a_rule_that_needs_it_is_refused() -> None:
    with pytest.raises(ValueError, match="hide_end is for rules that may run open, and 'sgd' may not"):
        InnerLoop(RULES["sgd"](), TASKS["quadratic"](), 0, hide_end=0.1)
    with pytest.raises(ValueError, match=r"hide_end must be a share from 0 to 1, got 1\.5"):
        ESTIMATORS["pes"](hide_end=1.5)
