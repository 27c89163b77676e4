"""The one inner loop: some steps of a batch of tasks under a rule.

Every task runs in a slot with its own step counter and horizon; a slot that reaches its horizon starts a new task
without waiting for the others. All draws are named by (seed, slot, episode, step), so a slot does the same in any
batch, and `Slots` is all there is to save for a bitwise resume.

A step goes: the family delivers gradients, the rule turns them into new parameters, a teacher may correct these, and
the family measures loss and gradient there, on the next batch. Estimators see the losses, validation the last slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lopt.core.tensors import Params
from lopt.meta.unroll.draws import Batches, Draws, Horizon
from lopt.meta.unroll.imitation import imitate, start_teacher
from lopt.meta.unroll.rule_calls import call_rule, join_params, view_params
from lopt.meta.unroll.slots import Slots, Window, detach_slots, join_windows, put_slots, select_slots
from lopt.rules import Rule, State
from lopt.tasks import Batch, TaskFamily

Stride = Callable[["InnerLoop", "Slots", Params, int], "tuple[Slots, Tensor]"]
"""Makes n steps of all slots, which have meta-weights of their own: the slots after them, and losses `[n, T]`."""


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
        hide_loss, hide_end: shares of the tasks whose rule is not told the loss, or the number of steps; the
            latter for rules that may run open.
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
    hide_loss: float = 0.0
    hide_end: float = 0.0
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
        if self.hide_end and not self.rule.open_ended:
            raise ValueError(f"hide_end is for rules that may run open, and {self.rule.name!r} may not: leave it out")

    @property
    def draws(self) -> Draws:
        """What is drawn for the slots of this loop: tasks, horizons, batches, followers of the teacher.

        It is made of the loop's settings, so that a loop with others (`dataclasses.replace`) draws by those.
        """
        return Draws(self.family, self.seed, self.horizon, self.members)

    # -- the family's part -------------------------------------------------------------------------

    def evaluate(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses `[T]` and gradients `[T, P]` of the base learners, as constants to autograd.

        The graph of the base learner is gone when it returns: only the rule's is kept through a window.

        Args:
            params: flat, `[T, P]`.
            batch: one of every slot.
        """
        # Evolution strategies run without derivatives, but base learners are trained by theirs all the same.
        with torch.enable_grad():
            flat = params.detach().requires_grad_()
            losses = self._losses(flat, batch)
            (grads,) = torch.autograd.grad(losses.sum(), [flat])
        return losses.detach(), grads

    def _losses(self, flat: Tensor, batch: Batch) -> Tensor:
        """Losses `[T]` as functions of flat parameters `[T, P]`."""
        return self.family.losses(self.family.spec.unflatten(flat), batch)

    def batch(self, slots: Slots, split: str = "train") -> Batch:
        """The batches that the slots' present losses and gradients were measured on, `[T, ...]` by name.

        Args:
            split: or those of another split for the same steps.
        """
        return self.draws.batches(slots, split, 0, 1)[0]

    def batches(self, slots: Slots, count: int) -> list[Batches]:
        """The batches of up to `count` next steps, of the train split and of the one that losses are recorded on.

        Returns:
            One entry a step; fewer than `count` where that many would take too much memory at once.
        """
        return self.draws.batches_ahead(slots, ("train", self.meta_split), count)

    # -- starting tasks ----------------------------------------------------------------------------

    def start(self, ids: Tensor, *, stagger: bool = False) -> Slots:
        """New tasks for slots that have done nothing yet: episode 0, before their first step.

        Args:
            ids: global numbers of the slots, int64 `[T]`.
            stagger: cut the first horizon of every slot at random, so that slots end at different times.
        """
        slots = self.restart(ids, torch.zeros_like(ids))
        return self.draws.stagger(slots) if stagger else slots

    def restart(self, ids: Tensor, episode: Tensor) -> Slots:
        """New tasks for the slots `ids` in the given episodes, both int64 `[T]`, before their first step.

        Loss and gradient at the initial parameters are there already: the first step of a rule begins with them.
        """
        draws, spec = self.draws, self.family.spec
        task, params = draws.start_tasks(ids, episode)
        horizon, empty = draws.horizons(ids, episode), params.new_zeros(len(ids))
        slots = Slots(
            ids=ids,
            episode=episode,
            step=torch.zeros_like(ids),
            horizon=horizon,
            task=task,
            params=params,
            state=self.rule.init_state(view_params(self.rule, spec, params), 1),
            teacher_state=start_teacher(self.teacher, spec, params),
            loss=empty,
            grad=torch.zeros_like(params),
            first_loss=empty,
        )
        # The first batch is drawn by the slots' names and tasks: so it takes slots to measure on it.
        loss, grad = self.evaluate(params, self.batch(slots))
        return slots._replace(loss=loss, grad=grad, first_loss=loss)

    def renew(self, slots: Slots, done: Tensor) -> Slots:
        """The slots with the task of their next episode where they are done; the others as they are.

        Args:
            done: bool `[T]`. What a new task is depends on the slot and its episode alone.
        """
        where = done.nonzero()[:, 0]
        fresh = self.restart(slots.ids[where], slots.episode[where] + 1)
        return put_slots(slots, where, fresh)

    # -- one step ----------------------------------------------------------------------------------

    def find_weights(self, slots: Slots) -> Params | None:
        """The slots' own meta-weights, `[T, ...]` by name; None where all take the rule's.

        Those that a function makes are asked for again whenever slots have started new tasks.
        """
        return self.meta_weights(slots) if callable(self.meta_weights) else self.meta_weights

    def _update(self, slots: Slots, weights: Params | None) -> tuple[Tensor, State]:
        """The rule's step for all slots."""
        update, spec = self.update or partial(call_rule, self.rule), self.family.spec
        loss, horizon = slots.loss, slots.horizon
        if self.hide_loss:  # a loss that is not finite is as none
            loss = loss.masked_fill(self.draws.hides(slots, "loss", self.hide_loss), torch.nan)
        if self.hide_end:
            horizon = horizon.masked_fill(self.draws.hides(slots, "end", self.hide_end), 0)
        args = (
            weights,
            view_params(self.rule, spec, slots.grad),
            view_params(self.rule, spec, slots.params),
            slots.state,
            loss,
            horizon,
        )
        # No generator's state is kept for the second time: draws are named, torch's global generator is not used.
        if self.checkpoint_update:
            params, state = checkpoint(update, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            params, state = update(*args)
        return join_params(self.rule, spec, params), state

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
        # What the rule sees: for second order as functions of the parameters, and as the family delivers it.
        seen = self._attach(slots) if self.order == 2 else slots
        task, grad = self.family.deliver(seen.task, seen.grad, seen.step)
        seen = seen._replace(task=task, grad=grad)
        # The step itself, and maybe the teacher's in its place.
        params, state = self._update(seen, weights)
        imitation, teacher_state = torch.zeros_like(slots.loss), slots.teacher_state
        if self.teacher is not None:
            follows = self.draws.follows(slots, self.follow)
            params, teacher_state, imitation = imitate(self.teacher, self.family.spec, seen, params, follows)
        slots = slots._replace(step=slots.step + 1, task=task, params=params, state=state, teacher_state=teacher_state)
        # Loss and gradient at the new parameters, which the next step begins with.
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
        # A window starts from constants: made leaves on a tensor of their own, since the carry is the caller's.
        params = slots.params if slots.params.requires_grad else slots.params.detach().requires_grad_()
        loss = self._losses(params, self.batch(slots))
        (grad,) = torch.autograd.grad(loss.sum(), params, create_graph=True)
        return slots._replace(loss=loss, grad=grad)

    # -- many steps --------------------------------------------------------------------------------

    def _stride(self, slots: Slots, weights: Params | None, count: int) -> tuple[Slots, Window]:
        """`count` steps of every slot, no restarts: the slots, and what the window says of these steps."""
        # Known before the steps are made, as no slot restarts: the device need not be asked in between.
        first_loss, episode = (x.expand(count, -1) for x in (slots.first_loss, slots.episode))
        steps = slots.step + torch.arange(1, count + 1, device=slots.step.device)[:, None]
        finished = steps >= slots.horizon
        # A stride of one's own knows neither teachers nor derivatives, and wants weights of each slot.
        if self.stride and weights is not None and self.teacher is None and not torch.is_grad_enabled():
            slots, losses = self.stride(self, slots, weights, count)
            imitation = torch.zeros_like(losses)
        else:
            records: list[list[Tensor]] = []
            while len(records) < count:
                ahead = 1 if torch.is_grad_enabled() else count - len(records)  # backpropagation is short of memory
                for batches in self.batches(slots, ahead):
                    slots, *record = self.step(slots, weights, batches)
                    records.append(record)
            losses, imitation = map(torch.stack, zip(*records, strict=True))
        values = [losses, imitation, first_loss, finished, episode, steps, torch.ones_like(finished)]
        return slots, Window._make([*values, detach_slots(slots)])

    def unroll(self, slots: Slots, num_steps: int, *, restart: bool = True) -> Window:
        """`num_steps` steps of all slots; a slot whose task ends goes on with a new one.

        Args:
            slots: which are left as they were.
            restart: False lets tasks run past their horizon instead.
        """
        strides, remaining = [], num_steps
        weights = self.find_weights(slots)
        while remaining:
            # As many steps at once as no task ends within: only then are there restarts to look for.
            end = max(1, int((slots.horizon - slots.step).min())) if restart else remaining
            slots, stride = self._stride(slots, weights, min(remaining, end))
            remaining -= len(stride.losses)
            if len(stride.losses) == end and restart:
                slots = self.renew(slots, stride.finished[-1])
                # New tasks may come with other perturbations.
                weights = self.find_weights(slots)
            strides.append(stride)
        return join_windows(strides, slots)

    def run_to_end(self, slots: Slots) -> Window:
        """Steps of every slot up to its own horizon; slots that are there rest.

        Returns:
            A window whose K is the longest way of a slot; where a slot rests, it is not `active` and its losses are 0.
        """
        weights = self.find_weights(slots)
        running, index = slots, torch.arange(len(slots.ids), device=slots.ids.device)
        loop, strides = self, []

        def spread(values: Tensor) -> Tensor:
            """The values of the slots that are running, `[n, T]`, and 0."""
            return values.new_zeros(len(values), len(slots.ids)).index_copy(1, index, values)

        while len(index):
            running, stride = loop._stride(running, weights, max(1, int((running.horizon - running.step).min())))
            strides.append(Window._make([*map(spread, stride[:-1]), running]))
            slots = put_slots(slots, index, running)
            # Those that are not there yet go on by themselves, so that nobody pays for slots that rest.
            unfinished = (running.step < running.horizon).nonzero()[:, 0]
            running, index = select_slots(running, unfinished), index[unfinished]
            loop = replace(self, stride=None)  # another size each time
            weights = None if weights is None else {key: w[unfinished] for key, w in weights.items()}
        # What belongs to the task, and not to the step, is there for resting slots, too.
        window = join_windows(strides, slots)
        first_loss, episode = (x.expand_as(window.steps) for x in (slots.first_loss, slots.episode))
        return window._replace(first_loss=first_loss, episode=episode)
