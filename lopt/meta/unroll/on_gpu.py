"""Populations of evolution strategies on a GPU: many steps of all slots from few launches by the CPU.

Slots and their meta-weights are copied to memory that stays where it is; there a step is the rule's by kernels
(`lopt.rules.programs.population`) where it has them, and may be captured, whole, in a CUDA graph: batches, losses,
gradients and the rule's update. Restarts happen between strides and outside of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lopt.core.tensors import Params
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.rules import Rule, State
from lopt.rules.programs.population import PopulationStep, find_population_obstacle
from lopt.rules.programs.registry import find_missing
from lopt.tasks import TaskFamily

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Makes of work on a device what repeats it; the work may be done in between, and may fail with RuntimeError."""

NOT_CAPTURED = "steps of populations are not captured in a CUDA graph"
WARM_UP = 3
KEPT = 2
"""Sizes of populations, such as of chunks and of the last one, whose memory is kept."""


def choose_stride(rule: Rule, family: TaskFamily, device: torch.device, *, capture: bool) -> PopulationStride | None:
    """How populations make their steps on a device, or None for plain ones, as on every CPU.

    It is decided once for a source: kernels where the rule has them for such shapes, plain operations otherwise.

    Args:
        capture: in a CUDA graph.
    """
    if device.type != "cuda":
        return None
    shapes = {"flat": (family.spec.size,)} if rule.elementwise else dict(zip(*_list_spec(family), strict=True))
    obstacle = find_missing([device], interpreted=False) or find_population_obstacle(rule, shapes, device)
    # Without kernels and without a graph, copying to memory that stays would be for nothing.
    if obstacle is not None and not capture:
        return None
    return PopulationStride(kernels=obstacle is None, capture=capture_graph if capture else None)


def _list_spec(family: TaskFamily) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    return family.spec.names, family.spec.shapes


class PopulationStride:
    """A `lopt.meta.unroll.inner_loop.Stride`; equal to plain steps up to rounding, and without kernels to the bit.

    Args:
        kernels: step by the rule's kernels, which it must have; parameters of another dtype than float32 are stepped
            plainly.
        capture: of a step; where it fails, that is said once in a warning and steps are made one by one.
    """

    def __init__(self, *, kernels: bool, capture: Capture | None = None) -> None:
        self.kernels, self.capture = kernels, capture
        self._known: list[_Arena] = []

    def __call__(self, loop: InnerLoop, slots: Slots, weights: Params, count: int) -> tuple[Slots, Tensor]:
        """`count` steps: the slots after them and the losses `[count, T]`."""
        with torch.cuda.device_of(slots.params):  # type: ignore[no-untyped-call]
            return self._make_steps(loop, slots, weights, count)

    def _make_steps(self, loop: InnerLoop, slots: Slots, weights: Params, count: int) -> tuple[Slots, Tensor]:
        # What changes from window to window does not make it another kind of step.
        kind = replace(loop, stride=None, meta_weights=None, horizon=None, follow=0.0, guidance=1.0)
        arena = next((known for known in self._known if known.fits(kind, slots)), None)
        if arena is None:
            arena = _Arena(kind, slots, self.kernels and slots.params.dtype == torch.float32)
        # The last used first: sizes that come no more are forgotten, with their memory.
        self._known = [arena, *(known for known in self._known if known is not arena)][:KEPT]
        arena.load(slots, weights)
        # A graph repeats addresses, not values: it is captured once for the memory of the arena.
        if self.capture is not None and arena.repeat is None:
            try:
                arena.repeat = self.capture(arena.step)
            except RuntimeError as error:
                self.capture = None
                reason = str(error).splitlines()[0]
                warnings.warn(f"{NOT_CAPTURED}: {reason}", stacklevel=2)
            arena.load(slots, weights)  # the work may have been done
        losses = []
        for _ in range(count):
            (arena.repeat or arena.step)()
            # The next step writes to the same place.
            losses.append(arena.loss.clone())
        return arena.read(slots), torch.stack(losses)


class _Arena:
    """The memory of T slots, and their step there.

    Args:
        loop: without meta-weights of slots; tells what a step is.
        slots: for their shapes.
        kernels: see `PopulationStride`.

    Attributes:
        loss: of the last step `[T]`.
        repeat: the captured step.
    """

    def __init__(self, loop: InnerLoop, slots: Slots, kernels: bool) -> None:
        self.kind = self.loop = loop
        self.slots: Slots = tree_map(_allocate, slots)
        self.loss = torch.empty_like(slots.loss)
        rule, count = loop.rule, len(slots.ids)
        # Kernels and graphs read addresses: frozen weights, too, get a place for each slot.
        self.weights = {name: w.detach().expand(count, *w.shape).clone() for name, w in rule.named_parameters()}
        self.loaded: Params | None = None
        self.repeat: Work | None = None
        self.kernels: PopulationStep | None = None
        if kernels:
            # A family that delivers other gradients writes them beside its own; else kernels read the slots' memory.
            delivered = type(loop.family).deliver is not TaskFamily.deliver
            flats = (torch.empty_like(self.slots.grad) if delivered else self.slots.grad, self.slots.params)
            self.grads, params = (
                {"flat": flat} if rule.elementwise else loop.family.spec.unflatten(flat) for flat in flats
            )
            self.kernels = PopulationStep(rule, self.grads, params, self.slots.state, self.weights)
            self.loop = replace(loop, update=self._update)

    def fits(self, loop: InnerLoop, slots: Slots) -> bool:
        """Whether the memory is for such slots."""
        pairs = zip(tree_leaves(self.slots), tree_leaves(slots), strict=True)
        return self.kind == loop and all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in pairs)

    def load(self, slots: Slots, weights: Params) -> None:
        """Take the values of slots, and of meta-weights `[T, ...]` if they are not those of the last time."""
        _copy(self.slots, slots)
        # Meta-weights stay the same until slots restart.
        if weights is not self.loaded:
            for name, w in self.loop.rule.named_parameters():
                self.weights[name].copy_(weights.get(name, w.detach()))
            if self.kernels is not None:
                self.kernels.load()
            self.loaded = weights

    def read(self, slots: Slots) -> Slots:
        """The slots that were loaded, as they are now."""
        now = self.slots
        # Only what a step changes is copied out; the rest is as it was loaded.
        changed = (now.step, now.task, now.params, now.state, now.loss, now.grad)
        step, task, params, state, loss, grad = tree_map(torch.clone, changed)
        return slots._replace(step=step, task=task, params=params, state=state, loss=loss, grad=grad)

    def step(self) -> None:
        """One step of all slots, in place."""
        after, loss, _ = self.loop.step(self.slots, self.weights if self.kernels is None else None)
        _copy(self.slots, after)
        self.loss.copy_(loss)

    def _update(
        self, _: None, grads: Params, params: Params, state: State, loss: Tensor, num_steps: Tensor
    ) -> tuple[Params, State]:
        """`Rule.update` by kernels, in place: all that it is given is in this memory, but for gradients of others."""
        assert self.kernels is not None
        for name, g in grads.items():
            if g.data_ptr() != self.grads[name].data_ptr():
                self.grads[name].copy_(g)
        self.kernels.step(loss, num_steps)
        return params, state._replace(step=state.step + 1)


def _allocate(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _copy(slots: Slots, values: Slots) -> None:
    """Give the slots' memory these values."""
    for old, new in zip(tree_leaves(slots), tree_leaves(values), strict=True):
        if old is not new:
            old.copy_(new)


def capture_graph(work: Work) -> Work:
    """A CUDA graph of what `work` launches on the present device: launched as one, without Python in between.

    The work is done a few times on a stream aside first, as torch asks for, so that nothing is compiled or allocated
    for good while it is captured.

    Raises:
        RuntimeError: the work asks for values of tensors, or does something else that cannot be captured.
    """
    present, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(present)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    present.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay
