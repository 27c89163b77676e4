"""Training curves: one task per seed, trained by a rule, all seeds at once.

Everything that is drawn (task, initial parameters, batches) is named by the seed and by nothing else, so two
rules given the same seeds start from the same point and see the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from lopt.core.random import derive_seeds
from lopt.core.tensors import Params
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, select_slots
from lopt.rules import Rule
from lopt.tasks import Batch, TaskFamily

DIVERGENCE_FACTOR = 10.0
"""A run that ends above this multiple of its first loss has diverged, as has one that is ever not finite."""

CHUNK_ELEMENTS = 2**23
"""Numbers (parameters, rule state, batch) that are worked on together, unless a chunk is given."""


@dataclass(frozen=True)
class Curves:
    """What T training runs of N steps leave behind. Diverged runs keep their infinities.

    Attributes:
        losses: `[N + 1, T]`, the loss on the batch of steps 0 to N of the split that the family is judged on; the
            first is before any update.
        final: `[T]`, the loss of the last parameters on that whole split.
        metrics: `[T]` by name, of the last parameters on the whole test (or other) split, such as "accuracy".
        seconds: wall-clock time of the steps, all runs together.
    """

    losses: Tensor
    final: Tensor
    metrics: dict[str, Tensor]
    seconds: float

    @property
    def mean(self) -> Tensor:
        """`[T]`, the mean loss over steps 1 to N: how fast a run was, where `final` says how far it came.

        The loss before any update is left out, as no rule can help it.
        """
        return self.losses[1:].mean(0)

    @property
    def diverged(self) -> Tensor:
        """Which runs went wrong, `[T]` bool: a loss that is not finite, or an end far above the start.

        How far is said by `DIVERGENCE_FACTOR`. A run that climbs and comes back has not diverged.
        """
        finite = self.losses.isfinite().all(0) & self.final.isfinite()
        return ~finite | (self.final > DIVERGENCE_FACTOR * self.losses[0].abs())


def run_curves(
    rule: Rule,
    family: TaskFamily,
    seeds: Tensor,
    num_steps: int,
    *,
    meta_weights: Params | None = None,
    seed: int = 0,
    stream: str = "evaluation",
    split: str = "test",
    pool: str = "test",
    chunk: int | None = None,
) -> Curves:
    """Train one new task of `family` per seed with `rule`, without gradients in the meta-weights.

    Args:
        seeds: int64 `[T]`; equal seeds are the same task with the same draws.
        num_steps: updates to make, also the horizon that a rule or schedule with `progress` sees.
        meta_weights: one set per run, `[T, ...]` by name, instead of the rule's own.
        seed, stream: name the draws of all seeds together; streams share no task with each other nor with
            meta-training.
        split: what the metrics are measured on.
        pool: that tasks are drawn from, one of `lopt.tasks.POOLS`.
        chunk: runs worked on together, to bound memory.
    Raises:
        ValueError: `num_steps` is less than 1 or there are no seeds.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if seeds.ndim != 1 or len(seeds) == 0:
        raise ValueError(f"seeds must be a tensor [T] with T >= 1, got shape {tuple(seeds.shape)}")

    # A loop for each chunk: weights of their own are cut as the runs are.
    def build_loop(rows: Tensor) -> InnerLoop:
        weights = None if meta_weights is None else {k: w[rows] for k, w in meta_weights.items()}
        return InnerLoop(
            rule,
            family,
            # In the seed, so that all that the loop draws differs from stream to stream.
            int(derive_seeds(seed, stream)),
            horizon=num_steps,
            meta_weights=weights,
            meta_split=family.judged,
            pool=pool,
        )

    with torch.no_grad():
        # Nothing is drawn by a run's place, so that chunks change no curve.
        rows = torch.arange(len(seeds))
        size = chunk or _fit_chunk(build_loop(rows[:1]), seeds[:1])
        parts = [_run_chunk(build_loop(r), seeds[r], num_steps, split) for r in torch.split(rows, size)]
    return Curves(
        torch.cat([part.losses for part in parts], dim=1),
        torch.cat([part.final for part in parts]),
        {key: torch.cat([part.metrics[key] for part in parts]) for key in parts[0].metrics},
        sum(part.seconds for part in parts),
    )


def _run_chunk(loop: InnerLoop, seeds: Tensor, num_steps: int, split: str) -> Curves:
    # Equal seeds are one task: it is drawn once and shared by the runs that compare weights on it.
    unique, where = torch.unique(seeds, return_inverse=True)
    slots = select_slots(loop.start(unique), where)
    # Only steps are timed: to draw the tasks and to score them is no work of the rule.
    began = time.perf_counter()
    window = loop.unroll(slots, num_steps, restart=False)
    seconds = time.perf_counter() - began
    losses = torch.cat([window.first_loss[:1], window.losses])
    return Curves(losses, *_score(loop.family, window.slots, split), seconds)


def _score(family: TaskFamily, slots: Slots, split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss on the split that the family is judged on, and metrics on `split`, `[T]` each."""
    count, task = len(slots.ids), family.drift(slots.task, slots.step)
    # The last batch says little of where a run has come to; families without a split have exact losses.
    judged = family.full_batch(task, count, family.judged)
    final = slots.loss if judged is None else _evaluate(family, family.loss, slots.params, judged)
    try:
        held_out = family.full_batch(task, count, split)
    except ValueError:  # a user's data without that split
        held_out = None
    return final, {} if held_out is None else _evaluate(family, family.metrics, slots.params, held_out)


def _evaluate(family: TaskFamily, function: Callable[..., Any], flat: Tensor, batch: Batch) -> Any:
    """`function(params, batch)` for every run, in groups that bound memory; what all runs share is not copied."""
    shared = {k: len(b) > 1 and b.stride(0) == 0 for k, b in batch.items()}
    values = {k: b[0] if shared[k] else b for k, b in batch.items()}
    dims = {k: None if shared[k] else 0 for k in batch}

    def evaluate_one(p: Tensor, b: Batch) -> Any:
        return function(family.spec.unflatten(p), b)

    group = max(1, CHUNK_ELEMENTS // sum(b[0].numel() for b in batch.values()))
    return vmap(evaluate_one, in_dims=(0, dims), chunk_size=group)(flat, values)


def _fit_chunk(loop: InnerLoop, seeds: Tensor) -> int:
    """How many runs fit into `CHUNK_ELEMENTS`."""
    slots = loop.start(seeds)
    state = [a for acc in slots.state.accumulators.values() for a in acc.values()]
    held = [slots.params, *state, *loop.batch(slots).values()]
    return max(1, CHUNK_ELEMENTS // sum(x.numel() for x in held))
