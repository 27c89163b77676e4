"""The one inner loop: some steps of a batch of tasks under a rule.

Every task runs in a slot with its own step counter and horizon; a slot that reaches its horizon starts a new task
without waiting for the others. All draws are named by (seed, slot, episode, step), so a slot does the same in any
batch, and `Slots` is all there is to save for a bitwise resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from lopt.rules import Rule, State
from lopt.tasks import Batch, Task, TaskFamily
from lopt.tensors import Params, derive_seeds, draw_uniform, make_generator, stack_trees

Horizon = Callable[[Tensor], Tensor]
"""Draws the horizons `[T]` int64 of new tasks from seeds `[T]`."""


class Slots(NamedTuple):
    """T tasks in progress; every tensor has T first.

    Attributes:
        ids: global number of the slot, int64; names its random streams.
        episode: tasks that this slot has finished, int64.
        step, horizon: steps made on the present task and steps to make, int64.
        task: what distinguishes the task, from `TaskFamily.sample`.
        params: flat parameters `[T, P]`.
        state: the rule's memory.
        teacher_state: the teacher rule's memory; empty without imitation.
        loss, grad: at `params` on the batch of `step`: `[T]` and `[T, P]`.
        first_loss: the loss at step 0 `[T]`.
    """

    ids: Tensor
    episode: Tensor
    step: Tensor
    horizon: Tensor
    task: Task
    params: Tensor
    state: State
    teacher_state: State | tuple[()]
    loss: Tensor
    grad: Tensor
    first_loss: Tensor


class Window(NamedTuple):
    """What K steps of T slots leave behind.

    Attributes:
        losses: `[K, T]`, after each step; differentiable in the meta-weights.
        imitation: `[K, T]`, half mean squared difference to the teacher's step (0 without a teacher).
        first_loss: `[K, T]`, the loss at step 0 of the task that the slot was on.
        finished: `[K, T]` bool, the task ended with this step.
        slots: where the slots are now, cut from the graph.
    """

    losses: Tensor
    imitation: Tensor
    first_loss: Tensor
    finished: Tensor
    slots: Slots


@dataclass(frozen=True)
class InnerLoop:
    """A rule on a task family: the settings under which slots are started and unrolled.

    Attributes:
        rule: the update policy.
        family: where tasks come from.
        seed: names all random draws.
        horizon: draws the number of steps of new tasks (the family's own by default).
        order: 1 feeds the rule constant gradients and losses (Andrychowicz et al. 2016), 2 differentiates through them.
        checkpoint_update: recompute the rule's update in backward instead of storing its activations.
        teacher: a rule to imitate (Chen et al. 2020, arXiv 2010.09089), or None.
        follow: probability that a task follows the teacher's steps instead of the rule's.
        update: a replacement of `rule.update`, such as its compiled form; same signature.
        meta_split: the data that the recorded losses are measured on; gradients for the rule always come from "train".
        meta_weights: one set of meta-weights per slot, `[T, ...]` by name, instead of the rule's own.
    """

    rule: Rule
    family: TaskFamily
    seed: int
    horizon: Horizon | None = None
    order: int = 1
    checkpoint_update: bool = False
    teacher: Rule | None = None
    follow: float = 0.0
    update: Callable[..., tuple[Params, State]] | None = None
    meta_weights: Params | None = None
    meta_split: str = "train"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        if self.order == 2 and self.update is not None:
            raise ValueError(
                "order=2 differentiates twice and cannot use a compiled update; set order=1 or compile=false"
            )
        if not 0 <= self.follow <= 1:
            raise ValueError(f"follow must be a probability, got {self.follow}")

    # -- the family's part -------------------------------------------------------------------------

    def evaluate(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses `[T]` and gradients `[T, P]` of flat parameters `[T, P]`, constants to autograd."""
        grads, losses = vmap(grad_and_value(self._flat_loss()))(params.detach(), batch)
        return losses.detach(), grads.detach()

    def _flat_loss(self) -> Callable[[Tensor, Batch], Tensor]:
        """The loss of one task as a function of its flat parameters `[P]`."""
        spec = self.family.spec  # drawn on first use, which must not be inside vmap
        return lambda flat, batch: self.family.loss(spec.unflatten(flat), batch)

    def _seeds(self, stream: str, slots: Slots) -> Tensor:
        return derive_seeds(self.seed, stream, slots.ids, slots.episode, slots.step)

    def batch(self, slots: Slots, split: str = "train") -> Batch:
        """The batches that belong to the slots' present steps."""
        return self.family.batch(slots.task, self._seeds("batch", slots), split)

    # -- starting tasks ----------------------------------------------------------------------------

    def start(self, ids: Tensor, *, stagger: bool = False) -> Slots:
        """New tasks for the slots `ids` (int64 `[T]`), episode 0.

        Args:
            stagger: cut the first horizon of every slot at random, so that slots end at different times.
        """
        slots = self.restart(ids, torch.zeros_like(ids))
        if stagger:
            share = draw_uniform(derive_seeds(self.seed, "stagger", ids), 1)[:, 0]
            slots = slots._replace(horizon=(share * slots.horizon).long() + 1)
        return slots

    def restart(self, ids: Tensor, episode: Tensor) -> Slots:
        """New tasks for the slots `ids` in the given episodes, both int64 `[T]`."""
        tasks, flats = [], []
        for i, e in zip(ids.tolist(), episode.tolist(), strict=True):
            task = self.family.sample(make_generator(derive_seeds(self.seed, "task", i, e)))
            generator = make_generator(derive_seeds(self.seed, "init", i, e))
            flats.append(self.family.spec.flatten(self.family.init(task, generator)))
            tasks.append(task)
        params = torch.stack(flats)
        if self.horizon is None:
            horizon = torch.full_like(ids, self.family.horizon)
        else:
            horizon = self.horizon(derive_seeds(self.seed, "horizon", ids, episode))
        empty = torch.zeros(len(ids))
        slots = Slots(
            ids=ids,
            episode=episode,
            step=torch.zeros_like(ids),
            horizon=horizon,
            task=stack_trees(tasks),
            params=params,
            state=self.rule.init_state(self._views(self.rule, params), 1),
            teacher_state=self._start_teacher(params),
            loss=empty,
            grad=torch.zeros_like(params),
            first_loss=empty,
        )
        loss, grad = self.evaluate(params, self.batch(slots))
        return slots._replace(loss=loss, grad=grad, first_loss=loss)

    def _start_teacher(self, params: Tensor) -> State | tuple[()]:
        if self.teacher is None:
            return ()
        return self.teacher.init_state(self._views(self.teacher, params), 1)

    # -- one step ----------------------------------------------------------------------------------

    def _views(self, rule: Rule, flat: Tensor) -> Params:
        """Parameters as the rule wants them: elementwise rules take the flat vector as one tensor."""
        return {"flat": flat} if rule.elementwise else self.family.spec.unflatten(flat)

    def _join(self, rule: Rule, params: Params) -> Tensor:
        return params["flat"] if rule.elementwise else self.family.spec.flatten(params)

    def _update(self, slots: Slots) -> tuple[Tensor, State]:
        """The rule's step for all slots."""
        update: Callable[..., Any] = self.update or self.rule
        if self.meta_weights is not None:
            weights = self.meta_weights

            def update(*args: Any) -> Any:
                return functional_call(self.rule, weights, args)

        args = (
            self._views(self.rule, slots.grad),
            self._views(self.rule, slots.params),
            slots.state,
            slots.loss,
            slots.horizon,
        )
        if self.checkpoint_update:
            params, state = checkpoint(update, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            params, state = update(*args)
        return self._join(self.rule, params), state

    def _imitate(self, slots: Slots, params: Tensor) -> tuple[Tensor, State, Tensor]:
        """Parameters where some tasks follow the teacher, its state, and the distance of the steps `[T]`."""
        assert self.teacher is not None
        assert isinstance(slots.teacher_state, State)
        with torch.no_grad():
            grads, params_now = (self._views(self.teacher, x) for x in (slots.grad, slots.params))
            taught, state = self.teacher.update(grads, params_now, slots.teacher_state, slots.loss, slots.horizon)
        target = self._join(self.teacher, taught)
        distance = 0.5 * (params - target).square().mean(-1)
        seeds = derive_seeds(self.seed, "follow", slots.ids, slots.episode)
        follows = draw_uniform(seeds, 1) < self.follow
        return torch.where(follows, target, params), state, distance

    def step(self, slots: Slots) -> tuple[Slots, Tensor, Tensor]:
        """One step of every slot, no restarts.

        Returns:
            The slots, their losses `[T]` (differentiable) and the imitation losses `[T]`.
        """
        params, state = self._update(self._attach(slots) if self.order == 2 else slots)
        imitation, teacher_state = torch.zeros_like(slots.loss), slots.teacher_state
        if self.teacher is not None:
            params, teacher_state, imitation = self._imitate(slots, params)
        slots = slots._replace(step=slots.step + 1, params=params, state=state, teacher_state=teacher_state)
        value, grad = self.evaluate(params, self.batch(slots))
        slots = slots._replace(loss=value, grad=grad)
        if self.order == 2:
            return slots, vmap(self._flat_loss())(params, self.batch(slots, self.meta_split)), imitation
        if self.meta_split != "train":
            value, grad = self.evaluate(params, self.batch(slots, self.meta_split))
        # The linear surrogate has the loss's value and its first-order meta-gradient, and keeps no graph of the
        # base learner.
        surrogate = value + (grad * (params - params.detach())).sum(-1)
        return slots, surrogate, imitation

    def _attach(self, slots: Slots) -> Slots:
        """The slots with loss and gradient as functions of `slots.params`, for second order."""
        params = slots.params if slots.params.requires_grad else slots.params.detach().requires_grad_()
        loss = vmap(self._flat_loss())(params, self.batch(slots))
        (grad,) = torch.autograd.grad(loss.sum(), params, create_graph=True)
        return slots._replace(loss=loss, grad=grad)

    # -- many steps --------------------------------------------------------------------------------

    def unroll(self, slots: Slots, num_steps: int, *, restart: bool = True) -> Window:
        """`num_steps` steps of all slots; a slot whose task ends goes on with a new one.

        Args:
            restart: False lets tasks run past their horizon instead.
        """
        losses, imitations, first_losses, finished = [], [], [], []
        for _ in range(num_steps):
            slots, loss, imitation = self.step(slots)
            done = slots.step >= slots.horizon
            losses.append(loss)
            imitations.append(imitation)
            first_losses.append(slots.first_loss)
            finished.append(done)
            if restart and bool(done.any()):
                slots = self.replace(slots, done)
        return Window(
            torch.stack(losses),
            torch.stack(imitations),
            torch.stack(first_losses),
            torch.stack(finished),
            detach_slots(slots),
        )

    def replace(self, slots: Slots, done: Tensor) -> Slots:
        """The slots with new tasks where `done` (bool `[T]`)."""
        where = done.nonzero()[:, 0]
        fresh = self.restart(slots.ids[where], slots.episode[where] + 1)
        return _map(lambda old, new: old.index_copy(0, where, new), slots, fresh)


def detach_slots(slots: Slots) -> Slots:
    """The slots cut from the autograd graph."""
    return _map(Tensor.detach, slots)


def select_slots(slots: Slots, which: Tensor | slice) -> Slots:
    """Some of the slots, by int64 indices or a slice."""
    return _map(lambda x: x[which], slots)


def join_slots(parts: list[Slots]) -> Slots:
    """Slots one after the other."""
    return _map(lambda *xs: torch.cat(xs), *parts)


def _map(function: Callable[..., Tensor], *slots: Slots) -> Slots:
    """`function` on every tensor of one or more `Slots`."""
    result: Slots = tree_map(function, *slots)
    return result
