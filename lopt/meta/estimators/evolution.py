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
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal
from lopt.core.tensors import Params
from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.bookkeeping import METRICS, Tally, average_members, find_finite, renew_sick
from lopt.meta.unroll.compiled import CompiledStride
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window, join_slots, repeat_slots, select_slots
from lopt.rules import Rule

CACHE_NUMBERS, HOST_NUMBERS = 2**20, 2**23
"""Parameters and state of the slots that are worked on together on a CPU; the latter where compiled code steps them."""


class Pairs(NamedTuple):
    """T tasks in progress: the carry of an evolution strategy.

    Attributes:
        slots: of the members that go on, those of a pair next to each other.
        drift: `[T, W]` float64, the sum of the perturbations since each task began, in units of sigma; W is 0 where the
            estimator does not need it.
    """

    slots: Slots
    drift: Tensor


@dataclass(eq=False, kw_only=True)
class Evolution(Estimator):
    """Antithetic evolution strategies on windows of `num_steps` steps.

    A pair with a loss or parameter that is not finite is dropped: it contributes nothing, and its slot starts a new
    task. The clamp of losses, imitation losses included, also bounds what one diverging pair does to the estimate. A
    subclass says how pairs are perturbed; that, and the attributes below, is all there is to a new strategy.

    Attributes:
        signs: of the perturbation, for each member that is run.
        kept: how many slots of a pair go on from window to window: all members, or (1) the last one only.
        persistent: losses count for the sum of the perturbations since the task began.
        staggered: slots start in different phases, so that one window sees all of training.
        sigma: standard deviation of the perturbations.
        task_chunk: tasks that are run together; by default as many as fit into the processor's cache.
        jitter: standard deviations of a normal offset on meta-weights, by name, that both members of a pair have for a
            task's run and that nothing tells the rule of: what reads feedback learns to make up for it.
        compile: make steps, the rule's and the base learner's part, by compiled code. It is made once for each size of
            chunks (at most two), which takes some ten seconds. Not with a teacher; and not where the loop has a stride
            of its own, as on a GPU with kernels.
        stride: makes the steps by compiled code, or None.

    Raises:
        ValueError: an option out of its range, or steps that are compiled and guided by a teacher. A name in `jitter`
            that no meta-weight has is refused when tasks are started.
    """

    signs: ClassVar[tuple[int, ...]] = (1, -1)
    kept: ClassVar[int] = 2
    persistent: ClassVar[bool] = False
    staggered: ClassVar[bool] = True
    metrics = (*METRICS, "gradient_noise")
    differentiates: ClassVar[bool] = False

    sigma: float = 0.01
    task_chunk: int | None = None
    jitter: dict[str, float] = field(default_factory=dict)
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if not self.loss_clamp > 1:
            raise ValueError(f"loss_clamp must be above 1, got {self.loss_clamp}")
        if self.task_chunk is not None and self.task_chunk < 1:
            raise ValueError(f"task_chunk must be at least 1, got {self.task_chunk}")
        for name, deviation in self.jitter.items():
            if not 0 < deviation < math.inf:
                raise ValueError(f"jitter of {name!r} must be above 0 and finite, got {deviation}")
        if self.compile and self.teacher is not None:
            raise ValueError("steps that a teacher guides cannot be compiled: set compile = false")
        self.stride = CompiledStride() if self.compile else None

    # -- what tells the estimators apart -------------------------------------------------------------------------------

    @abstractmethod
    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        """The perturbation of each pair, in units of sigma, `[T, W]`: of mean 0 and variance 1, drawn by name.

        It is asked for twice, when members are perturbed and when their losses are credited, and must be the same.

        Args:
            start: the pairs at the beginning of the window.
            episode: of the task that it is for, `[T]`: that of `start`, or a later one after a reset.
        """

    def unroll(self, loop: InnerLoop, slots: Slots) -> Window:
        """Run the members of all pairs through a window; a task that ends is followed by a new one.

        Args:
            loop: with the members' meta-weights.
            slots: of all members.
        """
        return loop.unroll(slots, self.num_steps)

    # -- the estimate --------------------------------------------------------------------------------------------------

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with the common settings, and steps by compiled code if it has no faster ones of its own.

        Compiled steps are kept by the estimator: later windows find them.
        """
        for name in self.jitter:
            choose("meta-weight", name, dict(loop.rule.named_parameters()))
        return replace(super().configure(loop), stride=loop.stride or self.stride)

    def start(self, loop: InnerLoop, ids: Tensor) -> Pairs:
        slots = self.configure(loop).start(ids.repeat_interleave(self.kept), stagger=self.staggered)
        # The sum takes W numbers a task; without columns it still tells how many pairs there are.
        size = count_weights(loop.rule) if self.persistent else 0
        return Pairs(slots, torch.zeros(len(ids), size, dtype=torch.float64, device=ids.device))

    @torch.no_grad()
    def estimate(self, loop: InnerLoop, carry: Pairs) -> Estimate:
        loop, tally, count = self.configure(loop), Tally(), len(carry.drift)
        # Chunks only bound memory: their sums add up, and pairs know nothing of each other.
        size = self.task_chunk or fit_chunk(loop.rule, carry, len(self.signs))
        chunks = [select_pairs(carry, begin, begin + size) for begin in range(0, count, size)]
        sums, squares, pairs = zip(*(self._run_chunk(loop, chunk, tally) for chunk in chunks), strict=True)
        # Dropped pairs have added 0: the mean is over the others, and 0 where none is left.
        scale = 1 / max(tally.alive, 1)
        gradient = reduce(operator.add, sums) * scale
        # Rounding may take the difference below 0 where pairs agree: its root would be NaN.
        variance = (reduce(operator.add, squares) * scale - gradient.square()).clamp(min=0) * scale  # of the mean
        # Standard error of the meta-gradient over its norm: above 1, a step is mostly noise.
        noise = {"gradient_noise": float(variance.sum().sqrt() / gradient.norm())}
        by_name = _split(gradient, loop.rule.meta_weights())
        return Estimate(by_name, tally.alive, join_pairs(list(pairs)), tally.summarize(count) | noise)

    def _run_chunk(self, loop: InnerLoop, pairs: Pairs, tally: Tally) -> tuple[Tensor, Tensor, Pairs]:
        """One window of some pairs: sums `[W]` of their gradients and of the squares of these, and the pairs after."""
        window = self._run_members(loop, pairs)
        objective = self.weigh(window, loop.family)
        # A pair is one measurement: without one of its members there is no difference, or no state to go on from.
        healthy = find_finite(window).view(len(pairs.drift), -1).all(1)
        guided = objective + self.imitation * loop.guidance * self._spread_imitation(window)
        # Chosen and not multiplied: 0 times what a sick pair has become would be NaN.
        gradients = torch.where(healthy[:, None], self._credit(loop, pairs, window, guided), 0.0)
        tally.add(window, average_members(objective.sum(0), healthy), healthy)
        return gradients.sum(0), gradients.square().sum(0), self._go_on(loop, pairs, window, healthy)

    def _run_members(self, loop: InnerLoop, pairs: Pairs) -> Window:
        """A window of all members, each with the rule's meta-weights and its own perturbation of them."""
        members, start = len(self.signs), self._select_first(pairs.slots)
        weights = {name: w.detach() for name, w in loop.rule.meta_weights().items()}
        dtype = next(iter(weights.values())).dtype
        signs = torch.tensor(self.signs, dtype=dtype, device=pairs.drift.device)

        # Made of the slots: in `nres` a task that starts within the window has a perturbation of its own.
        def perturb_weights(slots: Slots) -> Params:
            noise = self.perturb(loop, start, slots.episode[::members]).to(dtype)
            signed = (self.sigma * signs[:, None] * noise[:, None]).flatten(0, 1)
            moved = _split(signed, weights)
            return {name: w + moved[name] for name, w in weights.items()} | self._jitter(loop, slots, moved)

        # Where one slot of a pair goes on (`es`), all members start the window from its state.
        return self.unroll(
            replace(loop, meta_weights=perturb_weights, members=members),
            pairs.slots if self.kept == members else repeat_slots(pairs.slots, members),
        )

    def _jitter(self, loop: InnerLoop, slots: Slots, moved: Params) -> Params:
        """Those of the members' meta-weights that have an offset of the task's own, with it."""
        jittered, weights = {}, dict(loop.rule.named_parameters())  # also those that are not learned
        for index, (name, deviation) in enumerate(self.jitter.items()):
            w = weights[name].detach()
            # Named by slot and episode: members have these in common, and keep the offset for the whole run.
            seeds = derive_seeds(loop.seed, "jitter", slots.ids, slots.episode, index)
            offset = deviation * draw_normal(seeds, w.numel()).to(w.dtype).reshape(-1, *w.shape)
            jittered[name] = w + moved.get(name, 0) + offset
        return jittered

    def _credit(self, loop: InnerLoop, pairs: Pairs, window: Window, values: Tensor) -> Tensor:
        """The gradient estimate of each pair, `[T, W]`, from what each step adds to each member, `[K, T * members]`."""
        members, episode = len(self.signs), self._select_first(pairs.slots).episode
        # Members have the same task and batches: the perturbation is all that they differ by.
        rise = (values[:, 0::members] - values[:, 1::members]).double()  # of the loss, from minus to plus
        age = window.episode[:, ::members] - episode
        gradients = pairs.drift.new_zeros(len(pairs.drift), count_weights(loop.rule))
        # Steps after a reset belong to another task, which had another perturbation.
        for later in torch.unique(age).cpu().tolist():
            influence = self._find_influence(loop, pairs, episode + later)
            gradients += (rise * (age == later)).sum(0)[:, None] * influence / (2 * self.sigma)
        return gradients

    def _find_influence(self, loop: InnerLoop, pairs: Pairs, episode: Tensor) -> Tensor:
        """What the losses of each slot's task of these episodes count for, in units of sigma, `[T, W]`."""
        start = self._select_first(pairs.slots)
        noise = self.perturb(loop, start, episode)
        return noise + pairs.drift * (episode == start.episode)[:, None] if self.persistent else noise

    def _go_on(self, loop: InnerLoop, pairs: Pairs, window: Window, healthy: Tensor) -> Pairs:
        """The pairs after the window: the members that are kept, and new tasks for the pairs that are not healthy."""
        members, slots, drift = len(self.signs), window.slots, pairs.drift
        # The last member of `es` is the unperturbed run; `full_es` starts new tasks whatever is kept.
        if self.kept < members:
            slots = select_slots(slots, slice(members - 1, None, members))
        if self.persistent:  # a task that has not made a step has not been perturbed
            now = self._select_first(slots)
            drift = torch.where((now.step == 0)[:, None], 0.0, self._find_influence(loop, pairs, now.episode))
        if healthy.all():
            return Pairs(slots, drift)
        sick = ~healthy
        slots = renew_sick(loop, pairs.slots, slots, sick.repeat_interleave(self.kept))
        return Pairs(slots, torch.where(sick[:, None], 0.0, drift))

    def _select_first(self, slots: Slots) -> Slots:
        """The first slot of each pair, which tells the pair's task."""
        return select_slots(slots, slice(None, None, self.kept))

    def _spread_imitation(self, window: Window) -> Tensor:
        """What each step adds to the mean imitation loss of its task, `[K, T]`."""
        active = window.active.to(window.losses.dtype)
        # Clamped as losses are, or a diverging pair would decide the estimate by its imitation.
        return torch.minimum(window.imitation, self.loss_clamp * window.first_loss.abs()) * active / active.sum(0)


def select_pairs(pairs: Pairs, begin: int, end: int) -> Pairs:
    """The pairs from `begin` to `end`, each with all of its slots.

    How many slots a pair keeps is told by the pairs themselves. The tensors are views.
    """
    kept = len(pairs.slots.ids) // len(pairs.drift)
    return Pairs(select_slots(pairs.slots, slice(kept * begin, kept * end)), pairs.drift[begin:end])


def join_pairs(parts: list[Pairs]) -> Pairs:
    """Pairs one after the other, as they were before `select_pairs` took them apart.

    The parts come from one estimator, so that all keep the same number of slots.
    """
    return Pairs(join_slots([part.slots for part in parts]), torch.cat([part.drift for part in parts]))


def fit_chunk(rule: Rule, pairs: Pairs, members: int) -> int:
    """How many pairs are worked on together: on a CPU equal parts that its cache holds, otherwise all.

    A step touches each slot's parameters and state several times; from the cache that is several times faster. Compiled
    code goes through them once, slot by slot, so that more of them only share what a step costs beside.

    Args:
        rule: that steps them.
        pairs: all of them, for their sizes and device.
        members: slots that are run for each pair.
    """
    # Elsewhere a step takes as many launches for few slots as for all.
    if pairs.drift.device.type != "cpu":
        return len(pairs.drift)
    slot = pairs.slots
    accumulators = [a for fields in slot.state.accumulators.values() for a in fields.values()]
    numbers = sum(x[0].numel() for x in (slot.params, *accumulators))
    count = len(pairs.drift)
    limit = HOST_NUMBERS if rule.has("step_on_host") else CACHE_NUMBERS
    chunks = math.ceil(count / max(1, limit // (numbers * members)))
    # As equal as can be: a step of a small last chunk would cost nearly that of a full one.
    return math.ceil(count / max(1, chunks))


def draw_perturbation(loop: InnerLoop, *counters: Tensor) -> Tensor:
    """Standard normal `[T, W]` float64, named by the loop's seed and counters `[T]`.

    The counters say how long a perturbation lasts: slot and episode for a task's whole run, the step as well for a
    window. They are global, so that a slot's draws are the same on whatever rank it is.
    """
    return draw_normal(derive_seeds(loop.seed, "perturbation", *counters), count_weights(loop.rule))


def count_weights(rule: Rule) -> int:
    """W, the number of meta-weights that are learned: the length of a perturbation and of a flat gradient.

    Those that `trainer.train_only` has frozen are not among them.
    """
    return sum(w.numel() for w in rule.meta_weights().values())


def _split(flat: Tensor, weights: Mapping[str, Tensor]) -> Params:
    """Tensors `[..., *shape]` by name from a flat `[..., W]`, in the dtype of the weights."""
    pieces = torch.split(flat, [w.numel() for w in weights.values()], -1)
    return {
        name: piece.reshape((*piece.shape[:-1], *w.shape)).to(w.dtype)
        for (name, w), piece in zip(weights.items(), pieces, strict=True)
    }
