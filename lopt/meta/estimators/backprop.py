"""What truncated and full backpropagation share: windows in chunks, and tasks that go wrong.

A window keeps all its activations until it is differentiated. So many tasks may go through in chunks, each unrolled and
differentiated by itself; the gradients add up, since tasks know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.bookkeeping import Tally, are_finite, find_finite
from lopt.meta.unroll.inner_loop import InnerLoop, check_precision
from lopt.meta.unroll.rule_calls import compile_rule
from lopt.meta.unroll.slots import Slots, Window, join_slots, select_slots
from lopt.rules import Rule


@dataclass(eq=False, kw_only=True)
class Backprop(Estimator):
    """Backpropagation through an unrolled window.

    Attributes:
        loss_clamp: losses above this multiple of the task's first loss have no gradient, either.
        order: 1, or 2 to differentiate through the base learner's gradients as well.
        task_chunk: tasks per backward pass, to bound memory; all by default.
        checkpoint: "update" recomputes the rule's activations in backward; with order 2 "step" also
            the base learner's; None stores them.
        compile: run the rule's update through `torch.compile`.

    Raises:
        ValueError: an option out of its range, or a compiled update or rounded losses that would be differentiated
            twice.
    """

    loss_clamp: float = 1e3
    order: int = 1
    task_chunk: int | None = None
    checkpoint: str | None = None
    compile: bool = False

    _compiled: tuple[Rule, Callable[..., Any]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("order", self.order, (1, 2))
        choose("checkpoint", self.checkpoint, (None, "update", "step"))
        if self.checkpoint == "step" and self.order == 1:
            raise ValueError("checkpoint='step' is for order=2: with order=1 set 'update', nothing else is kept")
        if self.task_chunk is not None and self.task_chunk < 1:
            raise ValueError(f"task_chunk must be at least 1, got {self.task_chunk}")
        if self.order == 2 and self.compile:
            raise ValueError("order=2 cannot use a compiled update; set order=1 or compile=false")
        check_precision(self.precision, self.order)

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with the common settings, and with how the rule's update is made and differentiated.

        A compiled update is made for the loop's rule at the first call and kept.
        """
        return replace(
            super().configure(loop),
            order=self.order,
            checkpoint=self.checkpoint,
            update=self._compile(loop.rule) if self.compile else None,
        )

    def _compile(self, rule: Rule) -> Callable[..., Any]:
        """`compile_rule(rule)`, compiled once."""
        if self._compiled is None or self._compiled[0] is not rule:
            self._compiled = (rule, compile_rule(rule))
        return self._compiled[1]

    def backpropagate(self, loop: InnerLoop, slots: Slots, num_steps: int, *, restart: bool) -> Estimate:
        """Unroll `num_steps` steps of `slots` and differentiate, in chunks of `task_chunk`.

        A task whose losses, parameters or meta-gradient are not finite is dropped: the window is run again without
        it, it contributes nothing and its slot starts a new task. Slots are independent: the others are unaffected.

        Args:
            loop: configured.
            restart: tasks that end within the window are followed by new ones; False lets them run on.
        """
        count, device = len(slots.ids), slots.ids.device
        size = self.task_chunk or count
        healthy, tally, carried = torch.ones(count, dtype=torch.bool, device=device), Tally(), []
        weights = loop.rule.meta_weights()
        # Sums first: by how many tasks they are divided is only known when sick ones have been dropped.
        totals = [torch.zeros_like(w) for w in weights.values()]
        for begin in range(0, count, size):
            chunk = torch.arange(begin, min(begin + size, count), device=device)
            for tasks, window, objective, gradients in self._window(loop, slots, chunk, num_steps, restart):
                if window is None or objective is None:
                    healthy[tasks] = False
                    # Steps made in vain have been paid for, too.
                    tally.inner_steps += num_steps * len(tasks)
                    continue
                totals = [a + g for a, g in zip(totals, gradients, strict=True)]
                tally.add(window, objective, healthy[tasks])
                carried.append(window.slots)
        # The dropped tasks' slots go on with new ones, in the order of their numbers like all others.
        if not healthy.all():
            sick = select_slots(slots, (~healthy).nonzero()[:, 0])
            carried.append(loop.restart(sick.ids, sick.episode + 1))
        joined, scale = join_slots(carried), 1 / max(tally.alive, 1)
        if len(carried) > 1:
            joined = select_slots(joined, joined.ids.argsort())
        return Estimate(
            {name: total * scale for name, total in zip(weights, totals, strict=True)},
            tally.alive,
            joined,
            tally.summarize(count),
        )

    def _window(
        self, loop: InnerLoop, slots: Slots, tasks: Tensor, num_steps: int, restart: bool
    ) -> list[tuple[Tensor, Window | None, Tensor | None, list[Tensor]]]:
        """Objectives and summed gradients of the given tasks (indices into `slots`), and apart from them those to be
        dropped.
        """
        chosen = slots if len(tasks) == len(slots.ids) else select_slots(slots, tasks)
        window = loop.unroll(chosen, num_steps, restart=restart)
        finite = find_finite(window)
        if finite.all():
            objective, gradients = self._differentiate(loop, window)
            if are_finite(gradients):
                return [(tasks, window, objective, gradients)]
            if len(tasks) == 1:
                return [(tasks, None, None, [])]
            # Finite values with a non-finite derivative: bisect to the task that it comes from.
            halves = tasks.tensor_split(2)
        else:
            # One infinite loss makes the whole sum's gradient infinite: once more, without those tasks.
            halves = (tasks[finite],)
            if not finite.any():
                return [(tasks, None, None, [])]
        results = [result for half in halves for result in self._window(loop, slots, half, num_steps, restart)]
        return results + ([] if finite.all() else [(tasks[~finite], None, None, [])])

    def _differentiate(self, loop: InnerLoop, window: Window) -> tuple[Tensor, list[Tensor]]:
        """The tasks' objectives, `[K, T]`, and the gradient of their sum in the meta-weights."""
        objective = self.weigh(window, loop.family)
        # One backward pass for all: tasks are independent, so the sum's gradient is the sum of theirs.
        total = objective.sum()
        if self.teacher is not None:
            total = total + self.imitation * loop.guidance * window.imitation.mean(0).sum()
        weights = list(loop.rule.meta_weights().values())
        if not total.requires_grad:  # as where all tasks follow the teacher
            return objective.detach(), [torch.zeros_like(w) for w in weights]
        # Not `backward`: `.grad` is the outer optimizer's. A window need not use all meta-weights.
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        return objective.detach(), filled
