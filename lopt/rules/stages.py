"""What the stages of a rule receive and return: state, clock, elements, sums, and what is decided from these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lopt.rules.layout import Layout

Accumulators = dict[str, Tensor]
Means = dict[str, Tensor]
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class State(NamedTuple):
    """What a rule remembers between steps.

    Attributes:
        step: int64 `[*batch]`, updates made so far. Its shape tells the batch dimensions of all the rest.
        accumulators: for each parameter name a dict of tensors: `[*batch, (features,) *shape]`, with dimensions of 1
            where elements share a number, or `[*batch, features]` for the rule's `tensor_keys`. A scalar's is (1,).
    """

    step: Tensor
    accumulators: dict[str, Accumulators]


class Clock(NamedTuple):
    """How far the training is; all int64 `[*batch]`.

    Attributes:
        step: updates that the tensor has had.
        num_steps: updates that are planned, or None.
        run_step: updates that the run has had, which are more where a tensor had no gradient at times; None: `step`.
    """

    step: Tensor
    num_steps: Tensor | None
    run_step: Tensor | None = None

    def progress(self, dtype: torch.dtype) -> Tensor | None:
        """Share of the planned steps that the run has made (above 1 beyond the plan), or None."""
        step = self.step if self.run_step is None else self.run_step
        return None if self.num_steps is None else step.to(dtype) / self.num_steps.to(dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> Clock:
        """`function` of all that is known."""
        return Clock(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


class Elements(NamedTuple):
    """A parameter, or a part of it, as the stages on elements see it.

    Attributes:
        g, p: gradient and parameter `[*batch, *shape]`.
        acc: accumulators and fields, `[*batch, (features,) *shape or 1s]`.
        layout: of the whole parameter.
        whole: this is the whole parameter, and the fields that a stage makes are kept for the next ones.
    """

    g: Tensor
    p: Tensor
    acc: Accumulators
    layout: Layout
    whole: bool = False


class Sum(NamedTuple):
    """A sum over some axes of the elements at hand, which are kept with size 1."""

    value: Tensor
    axes: tuple[int, ...]


class Visit(NamedTuple):
    """What a stage on elements makes: new accumulators, sums, the additive step, and fields where they are `whole`."""

    acc: Mapping[str, Tensor] = NOTHING
    sums: Mapping[str, Sum] = NOTHING
    delta: Tensor | None = None
    fields: Mapping[str, Tensor] = NOTHING


class Decision(NamedTuple):
    """What a stage on a tensor's means makes.

    Attributes:
        acc: new accumulators.
        fields: tensors `[*batch, (features,) *shape or 1s]` that the later stages of this step find in `Elements.acc`.
        decided: what `move` and `finish` receive under this name: usually a tensor or a NamedTuple of tensors
            `[*batch, 1...]`, ready to broadcast against elements.
    """

    acc: Mapping[str, Tensor] = NOTHING
    fields: Mapping[str, Tensor] = NOTHING
    decided: Any = None


class AllTensors(NamedTuple):
    """All n parameters of a step at once, as `Rule.decide_together` sees them: numbers of each, never elements.

    Attributes:
        tensor_state: the accumulators of `Rule.tensor_keys`, `[*batch, n, features]`.
        means: of `measure`, `[*batch, count, ...]` for each tensor or group of `count` equal ones; n in all.
        layouts: of these groups.
        loss: training-batch loss `[*batch, 1]`, or None.
        clock: `[*batch, 1 or n]`.
    """

    tensor_state: Accumulators
    means: Sequence[Means]
    layouts: Sequence[Layout]
    loss: Tensor | None
    clock: Clock


class Steppable(Protocol):
    """One parameter, or several of equal shape, during one step: it owns its memory and how it is walked through.

    `step_tensors` calls the stages of a rule through this interface only, so that the same rule runs on whole tensors
    under autograd, in place in chunks, and on the shards of a DTensor.

    Attributes:
        layout: of the whole parameter, of which a process may hold a part.
        acc: accumulators, `[*batch, ...]`.
        batch: leading dimensions of all its tensors.
        count: how many parameters it holds.
        stacked: they have a dimension of their own, the last of the `batch` dimensions; else it is one without.
    """

    layout: Layout
    batch: tuple[int, ...]
    count: int
    stacked: bool

    @property
    def acc(self) -> Mapping[str, Tensor]: ...

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """Call the stage on all elements that are here and keep the new accumulators; returns the sums."""

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Keep new accumulators for good, and fields for the rest of this step."""

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """As `visit`, for the stage whose delta, after `finish`, is added to the parameter."""


def divide_sums(tensors: Sequence[Steppable], sums: Sequence[Mapping[str, Sum]]) -> list[Means]:
    """The means of tensors that are wholly here."""
    return [
        {key: total.value / count_elements(total.axes, tensor.layout) for key, total in own.items()}
        for tensor, own in zip(tensors, sums, strict=True)
    ]


def count_elements(axes: tuple[int, ...], layout: Layout) -> int:
    """How many elements a mean over `axes` is taken of; at least 1."""
    return max(1, prod([layout.shape[axis] for axis in axes]))  # a list: torch.compile does not take generators here
