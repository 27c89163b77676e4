"""What evolution strategies share: antithetic pairs of perturbed rules on the same tasks, and no derivatives.

A pair runs one task with meta-weights `phi + eps` and `phi - eps`; the meta-gradient is the mean over pairs of
`(L+ - L-) xi / (2 sigma^2)`. Which perturbation `eps` a pair has in a window, and which `xi` a loss counts for, is what
tells the estimators apart. Pairs are batched along the slots: T tasks are 2T slots with meta-weights of their own.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal
from lopt.core.tensors import Params
from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.objectives import (
    OBJECTIVES,
    average_steps,
    check_objective,
    find_baseline,
    find_finite,
    weigh_losses,
)
from lopt.meta.unroll.compiled import CompiledStride
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window, join_slots, put_slots, repeat_slots, select_slots
from lopt.rules import Rule
from lopt.tasks.base import SPLITS

CACHE_NUMBERS = 2**20
"""Parameters and state of the slots that are worked on together on a CPU."""


class Pairs(NamedTuple):
    """T tasks in progress.

    Attributes:
        slots: of the members that go on, those of a pair next to each other.
        drift: `[T, W]` float64, the sum of the perturbations since each task began, in units of sigma; W is 0 where the
            estimator does not need it.
    """

    slots: Slots
    drift: Tensor


class Evolution(Estimator):
    """Antithetic evolution strategies on windows of `num_steps` steps.

    A pair with a loss or parameter that is not finite is dropped: it contributes nothing, and its slot starts a new
    task.

    Args:
        num_steps: steps of a window, K.
        sigma: standard deviation of the perturbations.
        objective: "mean", "sum", "log", "baseline" or "final"; see `weigh_losses`.
        objective_split: data that the objective is measured on: "train", or "inner_valid" to train for generalisation.
        normalize, loss_clamp: see `weigh_losses`; the clamp also bounds what one diverging pair does to the estimate.
        task_chunk: tasks that are run together; by default as many as fit into the processor's cache.
        teacher: rule to imitate; `imitation` weighs its loss, clamped like others, and `follow` is the share of tasks
            of which both members take its steps.
        compile: make steps, the rule's and the base learner's part, by compiled code. It is made once for each size of
            chunks (at most two), which takes some ten seconds. Not with a teacher; and not where the loop has a stride
            of its own, as on a GPU with kernels.

    Attributes:
        signs: of the perturbation, for each member that is run.
        kept: how many slots of a pair go on from window to window: all members, or (1) the last one only.
        persistent: losses count for the sum of the perturbations since the task began.
        staggered: slots start in different phases, so that one window sees all of training.
        stride: makes the steps by compiled code, or None.
    """

    signs: ClassVar[tuple[int, ...]] = (1, -1)
    kept: ClassVar[int] = 2
    persistent: ClassVar[bool] = False
    staggered: ClassVar[bool] = True
    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES

    def __init__(
        self,
        num_steps: int = 20,
        sigma: float = 0.01,
        objective: str = "mean",
        objective_split: str = "train",
        normalize: bool = False,
        loss_clamp: float = 10.0,
        task_chunk: int | None = None,
        compile: bool = False,
        teacher: Rule | None = None,
        imitation: float = 0.0,
        follow: float = 0.0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if not loss_clamp > 1:
            raise ValueError(f"loss_clamp must be above 1, got {loss_clamp}")
        if task_chunk is not None and task_chunk < 1:
            raise ValueError(f"task_chunk must be at least 1, got {task_chunk}")
        self.num_steps, self.sigma, self.task_chunk = num_steps, sigma, task_chunk
        self.objective = check_objective(objective, self.objectives)
        self.objective_split = choose("objective_split", objective_split, SPLITS)
        self.normalize, self.loss_clamp = normalize, loss_clamp
        self.stride = CompiledStride() if compile else None
        if compile and teacher is not None:
            raise ValueError("steps that a teacher guides cannot be compiled: set compile = false")
        self._set_guidance(teacher, imitation, follow)

    # -- what tells the estimators apart -------------------------------------------------------------------------------

    @abstractmethod
    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        """The perturbation of each pair, in units of sigma, `[T, W]`.

        Args:
            start: the pairs at the beginning of the window.
            episode: of the task that it is for, `[T]`: that of `start`, or a later one after a reset.
        """

    # -- the estimate --------------------------------------------------------------------------------------------------

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The inner loop with this estimator's settings."""
        if self.objective == "baseline":
            find_baseline(loop.family)  # a family without one is refused before anything runs
        return replace(
            loop,
            teacher=self.teacher,
            follow=self.follow * loop.guidance,
            meta_split=self.objective_split,
            stride=loop.stride or self.stride,
        )

    def start(self, loop: InnerLoop, ids: Tensor) -> Pairs:
        """See `Estimator.start`."""
        slots = self.configure(loop).start(ids.repeat_interleave(self.kept), stagger=self.staggered)
        size = count_weights(loop.rule) if self.persistent else 0
        return Pairs(slots, torch.zeros(len(ids), size, dtype=torch.float64, device=ids.device))

    def unroll(self, loop: InnerLoop, slots: Slots) -> Window:
        """Run the members of all pairs through a window."""
        return loop.unroll(slots, self.num_steps)

    @torch.no_grad()
    def estimate(self, loop: InnerLoop, carry: Pairs) -> Estimate:
        """See `Estimator.estimate`."""
        loop = self.configure(loop)
        count = len(carry.drift)
        size = self.task_chunk or fit_chunk(carry, len(self.signs))
        done = [self._run_chunk(loop, select_pairs(carry, begin, begin + size)) for begin in range(0, count, size)]
        total = sum_totals([totals for totals, _ in done])
        scale = 1 / max(total.alive, 1)
        gradient = total.gradient * scale
        variance = (total.squares * scale - gradient.square()).clamp(min=0) * scale  # of the mean
        nothing = total.alive == 0
        metrics = {
            "loss": math.nan if nothing else total.loss * scale,
            "meta_loss": math.nan if nothing else total.meta_loss * scale,
            "objective": math.nan if nothing else total.objective * scale,
            "imitation_loss": math.nan if nothing else total.imitation * scale,
            "skipped_slots": float(count - total.alive),
            "finished_tasks": total.finished,
            "inner_steps": total.inner_steps,
            # Standard error of the meta-gradient over its norm: above 1, a step is mostly noise.
            "gradient_noise": float(variance.sum().sqrt() / gradient.norm()),
        }
        return Estimate(
            _split(gradient, loop.rule.meta_weights()), total.alive, join_pairs([p for _, p in done]), metrics
        )

    def _run_chunk(self, loop: InnerLoop, pairs: Pairs) -> tuple[Totals, Pairs]:
        """One window of some pairs."""
        members, count = len(self.signs), len(pairs.drift)
        start = select_slots(pairs.slots, slice(None, None, self.kept))
        signs = torch.tensor(self.signs, device=pairs.drift.device)
        weights = {name: w.detach() for name, w in loop.rule.meta_weights().items()}

        def perturb_weights(slots: Slots) -> Params:
            noise = self.perturb(loop, start, slots.episode[::members]).to(torch.get_default_dtype())
            signed = (self.sigma * signs[:, None] * noise[:, None]).flatten(0, 1)
            moved = _split(signed, weights)
            return {name: w + moved[name] for name, w in weights.items()}

        window = self.unroll(
            replace(loop, meta_weights=perturb_weights, members=members),
            pairs.slots if self.kept == members else repeat_slots(pairs.slots, members),
        )
        terms = weigh_losses(window, loop.family, self.objective, normalize=self.normalize, loss_clamp=self.loss_clamp)
        healthy = find_finite(window).view(count, members).all(1)
        guided = terms + self.imitation * loop.guidance * self._spread_imitation(window)
        rise = (guided[:, 0::members] - guided[:, 1::members]).double()  # of the loss, from minus to plus
        age = window.episode[:, ::members] - start.episode
        parts = pairs.drift.new_zeros(count, count_weights(loop.rule))

        def find_influence(episode: Tensor) -> Tensor:
            """What the losses of the slots' tasks of these episodes count for, `[T, W]`."""
            noise = self.perturb(loop, start, episode)
            return noise + pairs.drift * (episode == start.episode)[:, None] if self.persistent else noise

        for later in torch.unique(age).cpu().tolist():
            influence = find_influence(start.episode + later)
            parts += (rise * (age == later)).sum(0)[:, None] * influence / (2 * self.sigma)
        parts = torch.where(healthy[:, None], parts, 0.0)
        losses, relative, objective, imitation = (
            values.view(count, members)[healthy].mean(1)
            for values in (
                average_steps(window, window.losses),
                average_steps(window, window.losses / window.first_loss.abs()),
                terms.sum(0),
                average_steps(window, window.imitation),
            )
        )
        totals = Totals(
            parts.sum(0),
            parts.square().sum(0),
            int(healthy.sum()),
            float(losses.sum()),
            float(relative.sum()),
            float(objective.sum()),
            float(imitation.sum()),
            float(window.finished[:, ::members].sum()),
            float(window.active.sum()),
        )
        after = window.slots if self.kept == members else select_slots(window.slots, slice(members - 1, None, members))
        drift = pairs.drift
        if self.persistent:  # a task that has not made a step has not been perturbed
            now = select_slots(after, slice(None, None, self.kept))
            drift = torch.where((now.step == 0)[:, None], 0.0, find_influence(now.episode))
        pairs_after = Pairs(after, drift)
        return totals, pairs_after if healthy.all() else self._restart(loop, pairs, pairs_after, ~healthy)

    def _spread_imitation(self, window: Window) -> Tensor:
        """What each step adds to the mean imitation loss of its task, `[K, T]`."""
        active = window.active.to(window.losses.dtype)
        return torch.minimum(window.imitation, self.loss_clamp * window.first_loss.abs()) * active / active.sum(0)

    def _restart(self, loop: InnerLoop, before: Pairs, after: Pairs, sick: Tensor) -> Pairs:
        """`after` with new tasks for the pairs that are `sick`."""
        where = sick.repeat_interleave(self.kept).nonzero()[:, 0]
        old = select_slots(before.slots, where)
        fresh = loop.restart(old.ids, old.episode + 1)
        return Pairs(put_slots(after.slots, where, fresh), torch.where(sick[:, None], 0.0, after.drift))


class Totals(NamedTuple):
    """Sums over pairs: the gradient and its square `[W]` float64, how many were not dropped, losses, and counts."""

    gradient: Tensor
    squares: Tensor
    alive: int
    loss: float
    meta_loss: float
    objective: float
    imitation: float
    finished: float
    inner_steps: float


def sum_totals(parts: list[Totals]) -> Totals:
    """Field by field."""
    return Totals(*(reduce(operator.add, values) for values in zip(*parts, strict=True)))


def select_pairs(pairs: Pairs, begin: int, end: int) -> Pairs:
    """The pairs from `begin` to `end`."""
    kept = len(pairs.slots.ids) // len(pairs.drift)
    return Pairs(select_slots(pairs.slots, slice(kept * begin, kept * end)), pairs.drift[begin:end])


def join_pairs(parts: list[Pairs]) -> Pairs:
    """Pairs one after the other."""
    return Pairs(join_slots([part.slots for part in parts]), torch.cat([part.drift for part in parts]))


def fit_chunk(pairs: Pairs, members: int) -> int:
    """How many pairs are worked on together: on a CPU equal parts that its cache holds, otherwise all."""
    if pairs.drift.device.type != "cpu":
        return len(pairs.drift)
    slot = pairs.slots
    accumulators = [a for own in slot.state.accumulators.values() for a in own.values()]
    numbers = sum(x[0].numel() for x in (slot.params, *accumulators))
    count = len(pairs.drift)
    chunks = math.ceil(count / max(1, CACHE_NUMBERS // (numbers * members)))
    return math.ceil(count / max(1, chunks))


def draw_perturbation(loop: InnerLoop, *counters: Tensor) -> Tensor:
    """Standard normal `[T, W]` float64, named by the loop's seed and counters `[T]`."""
    return draw_normal(derive_seeds(loop.seed, "perturbation", *counters), count_weights(loop.rule))


def count_weights(rule: Rule) -> int:
    """W, the number of meta-weights that are learned."""
    return sum(w.numel() for w in rule.meta_weights().values())


def _split(flat: Tensor, weights: Mapping[str, Tensor]) -> Params:
    """Tensors `[..., *shape]` by name from a flat `[..., W]`, in the dtype of the weights."""
    pieces = torch.split(flat, [w.numel() for w in weights.values()], -1)
    return {
        name: piece.reshape((*piece.shape[:-1], *w.shape)).to(w.dtype)
        for (name, w), piece in zip(weights.items(), pieces, strict=True)
    }
