"""What truncated and full backpropagation share: windows in chunks, objectives, and tasks that go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.objectives import check_objective, find_baseline, find_finite, weigh_losses
from lopt.meta.unroll.inner_loop import InnerLoop, compile_rule
from lopt.meta.unroll.slots import Slots, Window, join_slots, select_slots
from lopt.rules import Rule
from lopt.tasks.base import SPLITS, TaskFamily

Kind = TypeVar("Kind", bound="Backprop")


class Backprop(Estimator):
    """Backpropagation through an unrolled window.

    Args:
        num_steps: steps of a window, K.
        order: 1, or 2 to differentiate through the base learner's gradients as well.
        objective: what is minimised, averaged over tasks: "mean", "sum", "log" (all phases of training count alike),
            "baseline" (in units of tuned Adam's progress) or "final"; see `weigh_losses`.
        objective_split: data that the objective is measured on: "train", or "inner_valid" to train for generalisation.
        normalize, loss_clamp: see `weigh_losses`.
        task_chunk: tasks per backward pass, to bound memory; all by default.
        checkpoint: "update" recomputes the rule's activations in backward, None stores them.
        compile: run the rule's update through `torch.compile`.
        teacher: rule to imitate; `imitation` weighs its loss, `follow` is the share of tasks that take its steps.
    """

    def __init__(
        self,
        num_steps: int = 20,
        order: int = 1,
        objective: str = "mean",
        objective_split: str = "train",
        normalize: bool = False,
        loss_clamp: float = 1e3,
        task_chunk: int | None = None,
        checkpoint: str | None = None,
        compile: bool = False,
        teacher: Rule | None = None,
        imitation: float = 0.0,
        follow: float = 0.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        if checkpoint not in (None, "update"):
            raise ValueError(f"checkpoint must be None or 'update', got {checkpoint!r}")
        if task_chunk is not None and task_chunk < 1:
            raise ValueError(f"task_chunk must be at least 1, got {task_chunk}")
        if order == 2 and compile:
            raise ValueError("order=2 cannot use a compiled update; set order=1 or compile=false")
        self.num_steps, self.order = num_steps, order
        self.objective, self.objective_split = (
            check_objective(objective),
            choose("objective_split", objective_split, SPLITS),
        )
        self.normalize, self.loss_clamp, self.task_chunk = normalize, loss_clamp, task_chunk
        self.checkpoint, self.compile = checkpoint, compile
        self._set_guidance(teacher, imitation, follow)

    _compiled: tuple[Rule, Callable[..., Any]] | None = None

    def _compile(self, rule: Rule) -> Callable[..., Any]:
        """`compile_rule(rule)`, compiled once."""
        if self._compiled is None or self._compiled[0] is not rule:
            self._compiled = (rule, compile_rule(rule))
        return self._compiled[1]

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The inner loop with this estimator's settings."""
        if self.objective == "baseline":
            find_baseline(loop.family)  # a family without one is refused before anything runs
        return replace(
            loop,
            order=self.order,
            checkpoint_update=self.checkpoint == "update",
            teacher=self.teacher,
            follow=self.follow * loop.guidance,
            meta_split=self.objective_split,
            update=self._compile(loop.rule) if self.compile else None,
        )

    def backpropagate(self, loop: InnerLoop, slots: Slots, num_steps: int, *, restart: bool) -> Estimate:
        """Unroll `num_steps` steps of `slots` and differentiate, in chunks of `task_chunk`.

        A task whose losses, parameters or meta-gradient are not finite is dropped: the window is run again without
        it, it contributes nothing and its slot starts a new task. Slots are independent: the others are unaffected.
        """
        count, device = len(slots.ids), slots.ids.device
        size = self.task_chunk or count
        parts, healthy = [], torch.ones(count, dtype=torch.bool, device=device)
        weights = loop.rule.meta_weights()
        totals = [torch.zeros_like(w) for w in weights.values()]
        sums: dict[str, float] = dict.fromkeys(("loss", "meta_loss", "objective", "imitation_loss"), 0.0)
        finished = 0
        for begin in range(0, count, size):
            rows = torch.arange(begin, min(begin + size, count), device=device)
            rows_done = self._window(loop, slots, rows, num_steps, restart)
            for good, window, gradients in rows_done:
                if window is None:
                    healthy[good] = False
                    continue
                totals = [a + g for a, g in zip(totals, gradients, strict=True)]
                losses = window.losses.detach()
                sums["loss"] += float(losses.mean(0).sum())
                sums["meta_loss"] += float((losses / window.first_loss.abs()).mean(0).sum())
                sums["objective"] += float(self._weigh(loop.family, window).detach().sum())
                sums["imitation_loss"] += float(window.imitation.detach().mean(0).sum())
                finished += int(window.finished.sum())
                parts.append(window.slots)
        alive = int(healthy.sum())
        if alive < count:
            sick = select_slots(slots, (~healthy).nonzero()[:, 0])
            parts.append(loop.restart(sick.ids, sick.episode + 1))
        joined = join_slots(parts)
        scale = 1 / max(alive, 1)
        metrics = {key: value * scale if alive else float("nan") for key, value in sums.items()} | {
            "skipped_slots": float(count - alive),
            "finished_tasks": float(finished),
            "inner_steps": float(num_steps * count),
        }
        return Estimate(
            {name: total * scale for name, total in zip(weights, totals, strict=True)},
            alive,
            select_slots(joined, joined.ids.argsort()),
            metrics,
        )

    def _window(
        self, loop: InnerLoop, slots: Slots, rows: Tensor, num_steps: int, restart: bool
    ) -> list[tuple[Tensor, Window | None, list[Tensor]]]:
        """Summed gradients of the tasks in `rows`, and apart from them the rows that must be dropped."""
        window = loop.unroll(select_slots(slots, rows), num_steps, restart=restart)
        finite = find_finite(window)
        if finite.all():
            gradients = self._differentiate(loop, window)
            if all(bool(g.isfinite().all()) for g in gradients):
                return [(rows, window, gradients)]
            if len(rows) == 1:
                return [(rows, None, [])]
            # Finite values with a non-finite derivative: bisect to the task that it comes from.
            halves = rows.tensor_split(2)
        else:
            halves = (rows[finite],)
            if not finite.any():
                return [(rows, None, [])]
        found = [part for half in halves for part in self._window(loop, slots, half, num_steps, restart)]
        return found + ([] if finite.all() else [(rows[~finite], None, [])])

    def _weigh(self, family: TaskFamily, window: Window) -> Tensor:
        """See `weigh_losses`."""
        return weigh_losses(window, family, self.objective, normalize=self.normalize, loss_clamp=self.loss_clamp)

    def _differentiate(self, loop: InnerLoop, window: Window) -> list[Tensor]:
        """Gradient of the tasks' summed objectives in the meta-weights."""
        total = self._weigh(loop.family, window).sum() + self.imitation * loop.guidance * window.imitation.mean(0).sum()
        weights = list(loop.rule.meta_weights().values())
        if not total.requires_grad:
            return [torch.zeros_like(w) for w in weights]
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
