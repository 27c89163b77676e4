"""The one inner loop: some steps of a batch of tasks under a rule.

Every task runs in a slot with its own step counter and horizon; a slot that reaches its horizon starts a new task
without waiting for the others. All draws are named by (seed, slot, episode, step), so a slot does the same in any
batch, and `Slots` is all there is to save for a bitwise resume.

A step goes: the family delivers gradients, the rule turns them into new parameters, a teacher may correct these, and
the family measures loss and gradient there, on the next batch. Estimators see the losses, validation the last slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import cudnn_sdp_enabled, flash_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.meta.unroll.draws import Batches, Draws, Horizon
from lopt.meta.unroll.errors import measure_errors
from lopt.meta.unroll.imitation import imitate, start_teacher
from lopt.meta.unroll.recomputed import call_step
from lopt.meta.unroll.rule_calls import update_slots, view_params
from lopt.meta.unroll.slots import Slots, Window, detach_slots, join_windows, put_slots
from lopt.meta.unroll.starts import begin_tasks, check_start
from lopt.rules import Rule, State
from lopt.tasks import Batch, TaskFamily

PRECISIONS = ("fp32", "bf16")
"""Of the base learners' losses and gradients."""

OTHER_KERNELS: tuple[Callable[[], bool], ...] = (flash_sdp_enabled, mem_efficient_sdp_enabled, cudnn_sdp_enabled)
"""Whether torch may use them for attention, beside the plain one."""

Stride = Callable[["InnerLoop", "Slots", Params, int], "tuple[Slots, Tensor]"]
"""Makes n steps of all slots, which have meta-weights of their own: the slots after them, and losses `[n, T]`."""


@dataclass(frozen=True)
class InnerLoop:
    """A rule on a task family: the settings under which slots are started and unrolled.

    Attributes:
        rule: the update policy.
        family: where tasks come from.
        seed: names all random draws.
        horizon: draws the number of steps of new tasks, or is that of all (the family's own by default).
        order: 1 feeds the rule constant gradients and losses (Andrychowicz et al. 2016), 2 differentiates through them.
        checkpoint: what is computed again in backward, not stored: the rule's "update", the whole "step", or nothing.
        teacher: a rule to imitate (Chen et al. 2020, arXiv 2010.09089), or None.
        follow: probability that a task follows the teacher's steps instead of the rule's.
        hide_end: share of the tasks whose rule, which may run open, is not told the end.
        precision: of the base learners' losses and gradients, one of `PRECISIONS`; "bf16" is autocast to it.
        guidance: factor on the weight of imitation and the share that follows, which an outer loop lets fall to 0.
        update: a replacement of `call_rule` for this rule, such as its compiled form; see `compile_rule`.
        meta_split: the data that the recorded losses are measured on; gradients for the rule always come from "train".
        meta_metric: such as "accuracy": 1 - this is recorded instead of the losses; without a derivative, at first 1.
        pool: that tasks are drawn from, one of `lopt.tasks.POOLS`.
        carries: slots go on after a window; where they do not, what their next step would begin with is not measured.
        meta_weights: one set of meta-weights per slot, `[T, ...]` by name, instead of the rule's own; or a function
            that makes them of the slots, called at the start of a window and whenever slots start new tasks.
        stride: makes the steps between restarts without derivatives, imitation or a single set of meta-weights.
        members: slots of every task, next to each other and always at the same step; what they share is drawn once.
    """

    rule: Rule
    family: TaskFamily
    seed: int
    horizon: Horizon | None = None
    order: int = 1
    checkpoint: str | None = None
    teacher: Rule | None = None
    follow: float = 0.0
    hide_end: float = 0.0
    precision: str = "fp32"
    guidance: float = 1.0
    update: Callable[..., tuple[Params, State]] | None = None
    meta_weights: Params | Callable[[Slots], Params] | None = None
    stride: Stride | None = None
    members: int = 1
    meta_split: str = "train"
    meta_metric: str = ""
    pool: str = "train"
    carries: bool = True

    def __post_init__(self) -> None:
        _check_order(self)
        check_precision(self.precision, self.order)
        if not 0 <= self.follow <= 1:
            raise ValueError(f"follow must be a probability, got {self.follow}")
        if self.hide_end and not self.rule.open_ended:
            raise ValueError(f"hide_end is for rules that may run open, and {self.rule.name!r} may not: leave it out")
        check_start(self.rule, self.family)

    @property
    def draws(self) -> Draws:
        """What is drawn for the slots of this loop: tasks, horizons, batches, followers of the teacher.

        It is made of the loop's settings, so that a loop with others (`dataclasses.replace`) draws by those.
        """
        return Draws(self.family, self.seed, self.horizon, self.members, self.pool)

    # -- the family's part -------------------------------------------------------------------------

    def evaluate(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses `[T]` and gradients `[T, P]` of the base learners, as constants to autograd.

        The graph of the base learner is gone when it returns: only the rule's is kept through a window.

        Args:
            params: flat, `[T, P]`.
            batch: one of every slot.
        """
        with _open_context(self, params.device):
            losses, grads = self.family.losses_and_grads(self.family.spec.unflatten(params.detach()), batch)
        return losses.to(params.dtype), self.family.spec.flatten(grads)

    def differentiate(self, params: Tensor, batch: Batch, *, twice: bool) -> tuple[Tensor, Tensor]:
        """Losses `[T]` as functions of the parameters `[T, P]`, and their gradients `[T, P]`, for second order.

        Args:
            twice: the gradients are functions of them, too; otherwise constants.
        """
        if not params.requires_grad:  # nothing that is learned has moved them yet
            return self.evaluate(params, batch)
        losses = self.losses(params, batch)
        (grads,) = torch.autograd.grad(losses.sum(), params, create_graph=twice, retain_graph=True)
        return losses, grads

    def losses(self, flat: Tensor, batch: Batch) -> Tensor:
        """Losses `[T]` as functions of flat parameters `[T, P]`, in the parameters' dtype whatever the precision."""
        with _open_context(self, flat.device):
            return self.family.losses(self.family.spec.unflatten(flat), batch).to(flat.dtype)

    def batch(self, slots: Slots, split: str = "train") -> Batch:
        """The batches that the slots' present losses and gradients were measured on, `[T, ...]` by name.

        Args:
            split: or those of another split for the same steps.
        """
        return self.draws.batches(slots, (split,), 0, 1)[0][split]

    def batches(self, slots: Slots, count: int, *, ends: bool = False) -> list[Batches]:
        """The batches of up to `count` next steps, of the train split and of the one that losses are recorded on.

        Args:
            ends: nothing is learned from them: the train split is left out.
        Returns:
            One entry a step; fewer than `count` where that many would take too much memory at once.
        """
        return self.draws.batches_ahead(slots, (self.meta_split,) if ends else ("train", self.meta_split), count)

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

        Loss and gradient at the initial parameters are there already: the first step of a rule begins with them. Where
        the rule learns these, they are left to the window that begins with them (`lopt.meta.unroll.starts`).
        """
        draws, spec = self.draws, self.family.spec
        task, learned = draws.start_tasks(ids, episode), self.rule.initial_params
        if learned is None:
            params = draws.start_params(ids, episode, task)
        else:
            params = next(iter(learned.values())).new_zeros(len(ids), spec.size)
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
        return slots if learned is not None else self.measure_first(slots)

    def measure_first(self, slots: Slots) -> Slots:
        """The slots with loss, gradient and first loss where they are, before their first step.

        The first loss is of the data that losses are recorded on: what these are relative to, and clamped by.
        """
        batches = self.draws.batches(slots, ("train", self.meta_split), 0, 1)[0]
        batch = batches["train"]
        if self.order == 2 and torch.is_grad_enabled():
            loss, grad = self.differentiate(slots.params, batch, twice=True)
        else:
            loss, grad = self.evaluate(slots.params, batch)
        first = loss.detach()
        if self.meta_metric:  # an error is a share already; families that do not measure it are refused here
            first = torch.ones_like(measure_errors(self, slots.params, batches))
        elif self.meta_split != "train":
            with torch.no_grad():
                first = self.losses(slots.params, batches[self.meta_split])
        return slots._replace(loss=loss, grad=grad, first_loss=first)

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

    def update_slots(self, slots: Slots, weights: Params | None) -> tuple[Tensor, State]:
        """The rule's step for all slots, from what they see: parameters `[T, P]` and state after it."""
        return update_slots(self, slots, weights)

    def step(
        self, slots: Slots, weights: Params | None = None, batches: Batches | None = None, *, last: bool = False
    ) -> tuple[Slots, Tensor, Tensor]:
        """One step of every slot, no restarts.

        Args:
            weights: the slots' own meta-weights, `[T, ...]` by name, or None for the rule's.
            batches: of the step, from `batches`; by default they are drawn here.
            last: of the window, after which nothing is differentiated.
        Returns:
            The slots, their losses `[T]` (differentiable) and the imitation losses `[T]`.
        """
        batches = batches or self.batches(slots, 1)[0]
        task, grad = self.family.deliver(slots.task, slots.grad, slots.step)
        seen = slots._replace(task=task, grad=grad)
        params, state = self.update_slots(seen, weights)
        imitation, teacher_state = torch.zeros_like(slots.loss), slots.teacher_state
        if self.teacher is not None:
            follows = self.draws.follows(slots, self.follow)
            params, teacher_state, imitation = imitate(self.teacher, self.family.spec, seen, params, follows)
        slots = slots._replace(step=slots.step + 1, task=task, params=params, state=state, teacher_state=teacher_state)
        # Loss and gradient at the new parameters, which the next step begins with; all else is of the recorded loss.
        second = self.order == 2 and torch.is_grad_enabled()
        value, grad = slots.loss, slots.grad.detach()
        needed = self.carries or not last
        if needed and second:
            value, grad = self.differentiate(params, batches["train"], twice=not last)
        elif needed:
            value, grad = self.evaluate(params, batches["train"])
        slots = slots._replace(loss=value, grad=grad)
        if self.meta_metric:
            return slots, measure_errors(self, params, batches), imitation
        if second:
            apart = self.meta_split != "train" or not needed
            return slots, self.losses(params, batches[self.meta_split]) if apart else value, imitation
        if self.meta_split != "train" or not needed:
            value, grad = self.evaluate(params, batches[self.meta_split])
        if not torch.is_grad_enabled():
            return slots, value, imitation
        # The linear surrogate has the loss's value and its first-order meta-gradient, and keeps no graph of the
        # base learner.
        surrogate = value + (grad * (params - params.detach())).sum(-1)
        return slots, surrogate, imitation

    # -- many steps --------------------------------------------------------------------------------

    def advance(self, slots: Slots, weights: Params | None, count: int, *, last: bool = True) -> tuple[Slots, Window]:
        """`count` steps of every slot, no restarts: the slots, and what the window says of these steps.

        Args:
            weights: of the slots, from `find_weights`.
            last: of the window; otherwise what they end with is still differentiated.
        """
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
                final = last and len(records) + ahead == count
                for batches in self.batches(slots, ahead, ends=final and ahead == 1 and not self.carries):
                    slots, *record = call_step(self, slots, weights, batches, last=last and len(records) == count - 1)
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
        # Once for all steps of second order; `losses` then finds it open.
        with _open_context(self, slots.params.device) if self.order == 2 else nullcontext():
            return self._unroll(slots, num_steps, restart)

    def _unroll(self, slots: Slots, num_steps: int, restart: bool) -> Window:
        strides, remaining = [], num_steps
        weights = self.find_weights(slots)
        slots = begin_tasks(self, slots, weights)
        while remaining:
            # As many steps at once as no task ends within: only then are there restarts to look for.
            end = max(1, int((slots.horizon - slots.step).min())) if restart else remaining
            slots, stride = self.advance(slots, weights, min(remaining, end), last=remaining <= end)
            remaining -= len(stride.losses)
            if len(stride.losses) == end and restart:
                slots = self.renew(slots, stride.finished[-1])
                # New tasks may come with other perturbations.
                weights = self.find_weights(slots)
                slots = begin_tasks(self, slots, weights) if remaining else slots
            strides.append(stride)
        return join_windows(strides, slots)


def check_precision(precision: str, order: int) -> None:
    """Refuse a precision that there is not, and one below fp32 where gradients are differentiated.

    Raises:
        ValueError: either.
    """
    choose("precision", precision, PRECISIONS)
    if order == 2 and precision != "fp32":
        raise ValueError(f"order=2 needs precision='fp32', got {precision!r}; set order=1 or leave it out")


def _check_order(loop: InnerLoop) -> None:
    """Refuse an order that there is not, and the second one where derivatives cannot be differentiated."""
    if loop.order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {loop.order}")
    if loop.order == 2 and loop.update is not None:
        raise ValueError("order=2 differentiates twice and cannot use a compiled update; set order=1 or compile=false")
    if loop.order == 2 and loop.family.black_box:
        raise ValueError(
            f"order=2 differentiates the gradients of base learners, and those of {loop.family.name!r} "
            "are estimates of a black box; set order=1"
        )


def _open_context(loop: InnerLoop, device: torch.device) -> AbstractContextManager[Any]:
    """What base learners' losses are measured in."""
    if loop.precision == "bf16":
        # Not cached: parameters are others in every step, and graphs that are captured must not share their casts.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    # Of torch's kernels for attention only the plain one has second derivatives; to choose it takes long.
    if loop.order == 1 or not any(ask() for ask in OTHER_KERNELS):
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
