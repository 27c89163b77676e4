"""The one inner loop: some steps of a batch of tasks under a rule.

Every task runs in a slot with its own step counter and horizon; a slot that reaches its horizon starts a new task
without waiting for the others. All draws are named by (seed, slot, episode, step), so a slot does the same in any
batch, and `Slots` is all there is to save for a bitwise resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lopt.core.random import derive_seeds, draw_uniform, make_generator
from lopt.core.tensors import Params, stack_trees
from lopt.meta.unroll.slots import Slots, Window, detach_slots, join_windows, put_slots, select_slots
from lopt.rules import Rule, State
from lopt.tasks import Batch, Task, TaskFamily

Stride = Callable[["InnerLoop", "Slots", Params, int], "tuple[Slots, Tensor]"]
"""Makes n steps of all slots, which have meta-weights of their own: the slots after them, and losses `[n, T]`."""

Horizon = Callable[[Tensor], Tensor]
"""Draws the horizons `[T]` int64 of new tasks from seeds `[T]`."""

Batches = dict[str, Batch]
"""The batches of one step, by split."""

DRAWN_NUMBERS = 2**21
"""Batches of later steps are drawn at once as long as they have fewer numbers, those of the tasks included."""


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
        guidance: factor on the weight of imitation and the share that follows, which an outer loop lets fall to 0.
        update: a replacement of `call_rule` for this rule, such as its compiled form; see `compile_rule`.
        meta_split: the data that the recorded losses are measured on; gradients for the rule always come from "train".
        meta_weights: one set of meta-weights per slot, `[T, ...]` by name, instead of the rule's own; or a function
            that makes them of the slots, called at the start of a window and whenever slots start new tasks.
        stride: makes the steps between restarts without derivatives, imitation or a single set of meta-weights.
        members: every task has this many slots, next to each other and always at the same step; what they share is
            drawn once.
    """

    rule: Rule
    family: TaskFamily
    seed: int
    horizon: Horizon | None = None
    order: int = 1
    checkpoint_update: bool = False
    teacher: Rule | None = None
    follow: float = 0.0
    guidance: float = 1.0
    update: Callable[..., tuple[Params, State]] | None = None
    meta_weights: Params | Callable[[Slots], Params] | None = None
    stride: Stride | None = None
    members: int = 1
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
        with torch.enable_grad():
            flat = params.detach().requires_grad_()
            losses = self._losses(flat, batch)
            (grads,) = torch.autograd.grad(losses.sum(), [flat])
        return losses.detach(), grads

    def _losses(self, flat: Tensor, batch: Batch) -> Tensor:
        """Losses `[T]` as functions of flat parameters `[T, P]`."""
        return self.family.losses(self.family.spec.unflatten(flat), batch)

    def batch(self, slots: Slots, split: str = "train") -> Batch:
        """The batches that belong to the slots' present steps."""
        return self._draw_batches(slots, split, 0, 1)[0]

    def batches(self, slots: Slots, count: int) -> list[Batches]:
        """The batches of the slots' next steps: of `count` of them, or of as many as are well drawn at once."""
        splits = dict.fromkeys(("train", self.meta_split))
        drawn = {split: self._draw_batches(slots, split, 1, 1) for split in splits}
        size = sum(x.numel() for own in (slots.task, *(parts[0] for parts in drawn.values())) for x in own.values())
        more = min(count, DRAWN_NUMBERS // max(1, size)) - 1
        if more > 0:
            drawn = {split: parts + self._draw_batches(slots, split, 2, more) for split, parts in drawn.items()}
        return [dict(zip(drawn, parts, strict=True)) for parts in zip(*drawn.values(), strict=True)]

    def _draw_batches(self, slots: Slots, split: str, first: int, count: int) -> list[Batch]:
        """The batches of `count` steps, the first of them `first` steps from now."""
        owners = slice(None, None, self.members)
        size = len(slots.ids[owners])
        steps = slots.step[owners] + torch.arange(first, first + count, device=slots.ids.device)[:, None]
        seeds = derive_seeds(self.seed, "batch", slots.ids[owners], slots.episode[owners], steps).flatten()
        task = {key: x[owners] for key, x in slots.task.items()}
        if count > 1:
            task = {key: x.repeat(count, *[1] * (x.ndim - 1)) for key, x in task.items()}
        drawn = self.family.batch(task, seeds, split)

        def pick(x: Tensor, i: int) -> Tensor:
            own = x[i * size : (i + 1) * size]
            return own if self.members == 1 else own.repeat_interleave(self.members, 0)

        return [{key: pick(x, i) for key, x in drawn.items()} for i in range(count)]

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
        device = ids.device
        names = list(zip(ids.cpu().tolist(), episode.cpu().tolist(), strict=True))
        drawn = {name: self._draw(*name) for name in dict.fromkeys(names)}
        params = torch.stack([drawn[name][1] for name in names]).to(device)
        if self.horizon is None:
            horizon = torch.full_like(ids, self.family.horizon)
        else:
            # What is shared is drawn for slot 0.
            owners = torch.zeros_like(ids) if getattr(self.horizon, "shared", False) else ids
            horizon = self.horizon(derive_seeds(self.seed, "horizon", owners, episode))
        empty = params.new_zeros(len(ids))
        slots = Slots(
            ids=ids,
            episode=episode,
            step=torch.zeros_like(ids),
            horizon=horizon,
            task={key: x.to(device) for key, x in stack_trees(drawn[name][0] for name in names).items()},
            params=params,
            state=self.rule.init_state(self._views(self.rule, params), 1),
            teacher_state=self._start_teacher(params),
            loss=empty,
            grad=torch.zeros_like(params),
            first_loss=empty,
        )
        loss, grad = self.evaluate(params, self.batch(slots))
        return slots._replace(loss=loss, grad=grad, first_loss=loss)

    def _draw(self, slot: int, episode: int) -> tuple[Task, Tensor]:
        """A slot's task of an episode, and its flat initial parameters `[P]`."""
        task = self.family.sample(make_generator(derive_seeds(self.seed, "task", slot, episode)))
        generator = make_generator(derive_seeds(self.seed, "init", slot, episode))
        return task, self.family.spec.flatten(self.family.init(task, generator))

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

    def _find_weights(self, slots: Slots) -> Params | None:
        """The slots' own meta-weights, if they have any."""
        return self.meta_weights(slots) if callable(self.meta_weights) else self.meta_weights

    def _update(self, slots: Slots, weights: Params | None) -> tuple[Tensor, State]:
        """The rule's step for all slots."""
        update = self.update or partial(call_rule, self.rule)
        args = (
            weights,
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

    def step(
        self, slots: Slots, weights: Params | None = None, batches: Batches | None = None
    ) -> tuple[Slots, Tensor, Tensor]:
        """One step of every slot, no restarts.

        Args:
            weights: the slots' own meta-weights, `[T, ...]` by name, or None for the rule's.
            batches: of the step, from `batches`; by default they are drawn here.
        Returns:
            The slots, their losses `[T]` (differentiable) and the imitation losses `[T]`.
        """
        batches = batches or self.batches(slots, 1)[0]
        seen = self._attach(slots) if self.order == 2 else slots
        task, grad = self.family.deliver(seen.task, seen.grad, seen.step)
        seen = seen._replace(task=task, grad=grad)
        params, state = self._update(seen, weights)
        imitation, teacher_state = torch.zeros_like(slots.loss), slots.teacher_state
        if self.teacher is not None:
            params, teacher_state, imitation = self._imitate(seen, params)
        slots = slots._replace(step=slots.step + 1, task=task, params=params, state=state, teacher_state=teacher_state)
        value, grad = self.evaluate(params, batches["train"])
        slots = slots._replace(loss=value, grad=grad)
        if self.order == 2:
            return slots, self._losses(params, batches[self.meta_split]), imitation
        if self.meta_split != "train":
            value, grad = self.evaluate(params, batches[self.meta_split])
        if not torch.is_grad_enabled():
            return slots, value, imitation
        # The linear surrogate has the loss's value and its first-order meta-gradient, and keeps no graph of the
        # base learner.
        surrogate = value + (grad * (params - params.detach())).sum(-1)
        return slots, surrogate, imitation

    def _attach(self, slots: Slots) -> Slots:
        """The slots with loss and gradient as functions of `slots.params`, for second order."""
        params = slots.params if slots.params.requires_grad else slots.params.detach().requires_grad_()
        loss = self._losses(params, self.batch(slots))
        (grad,) = torch.autograd.grad(loss.sum(), params, create_graph=True)
        return slots._replace(loss=loss, grad=grad)

    # -- many steps --------------------------------------------------------------------------------

    def _stride(self, slots: Slots, weights: Params | None, count: int) -> tuple[Slots, Window]:
        """`count` steps of every slot, no restarts: the slots, and what the window says of these steps."""
        first_loss, episode = (x.expand(count, -1) for x in (slots.first_loss, slots.episode))
        steps = slots.step + torch.arange(1, count + 1, device=slots.step.device)[:, None]
        finished = steps >= slots.horizon
        if self.stride and weights is not None and self.teacher is None and not torch.is_grad_enabled():
            slots, losses = self.stride(self, slots, weights, count)
            imitation = torch.zeros_like(losses)
        else:
            made: list[list[Tensor]] = []
            while len(made) < count:
                ahead = 1 if torch.is_grad_enabled() else count - len(made)  # backpropagation is short of memory
                for batches in self.batches(slots, ahead):
                    slots, *values = self.step(slots, weights, batches)
                    made.append(values)
            losses, imitation = map(torch.stack, zip(*made, strict=True))
        values = [losses, imitation, first_loss, finished, episode, steps, torch.ones_like(finished)]
        return slots, Window._make([*values, detach_slots(slots)])

    def unroll(self, slots: Slots, num_steps: int, *, restart: bool = True) -> Window:
        """`num_steps` steps of all slots; a slot whose task ends goes on with a new one.

        Args:
            restart: False lets tasks run past their horizon instead.
        """
        parts, left = [], num_steps
        weights = self._find_weights(slots)
        while left:
            end = max(1, int((slots.horizon - slots.step).min())) if restart else left
            slots, part = self._stride(slots, weights, min(left, end))
            left -= len(part.losses)
            if len(part.losses) == end and restart:
                slots = self.replace(slots, part.finished[-1])
                weights = self._find_weights(slots)
            parts.append(part)
        return join_windows(parts, slots)

    def run_to_end(self, slots: Slots) -> Window:
        """Steps of every slot up to its own horizon; slots that are there rest. K is the longest way."""
        weights = self._find_weights(slots)
        now, rows = slots, torch.arange(len(slots.ids), device=slots.ids.device)
        loop, parts = self, []

        def spread(values: Tensor) -> Tensor:
            """The values of the rows that are left, `[n, T]`, and 0."""
            return values.new_zeros(len(values), len(slots.ids)).index_copy(1, rows, values)

        while len(rows):
            now, part = loop._stride(now, weights, max(1, int((now.horizon - now.step).min())))
            parts.append(Window._make([*map(spread, part[:-1]), now]))
            slots = put_slots(slots, rows, now)
            left = (now.step < now.horizon).nonzero()[:, 0]
            now, rows = select_slots(now, left), rows[left]
            loop = replace(self, stride=None)  # another size each time
            weights = None if weights is None else {key: w[left] for key, w in weights.items()}
        window = join_windows(parts, slots)
        first_loss, episode = (x.expand_as(window.steps) for x in (slots.first_loss, slots.episode))
        return window._replace(first_loss=first_loss, episode=episode)

    def replace(self, slots: Slots, done: Tensor) -> Slots:
        """The slots with new tasks where `done` (bool `[T]`)."""
        where = done.nonzero()[:, 0]
        fresh = self.restart(slots.ids[where], slots.episode[where] + 1)
        return put_slots(slots, where, fresh)


def call_rule(rule: Rule, weights: Params | None, *args: Any) -> tuple[Params, State]:
    """`rule.update(*args)`, with these meta-weights instead of the rule's own if they are not None."""
    result: tuple[Params, State] = rule(*args) if weights is None else functional_call(rule, weights, args)
    return result


def compile_rule(rule: Rule) -> Callable[..., tuple[Params, State]]:
    """`call_rule` for this rule through `torch.compile`: one graph for each number of slots."""
    return torch.compile(partial(call_rule, rule), dynamic=False)
