"""What the stages of a rule receive and return: state, clock, elements, sums, and what is decided from these.

`lopt.rules.base` has the stages and their order. These types are between rules, which say what is computed, and
`Steppable`s, which say where it lies: whole under autograd, in chunks, in stacks, or in shards over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lopt.rules.layout import Layout

Accumulators = dict[str, Tensor]
Means = dict[str, Tensor]
PLACE = "place"
"""The accumulator of rules that ask where in the model a tensor is: its number among the parameters, from 0."""

NOTHING: Mapping[str, Any] = {}  # not frozen: the compiler of torch 2.10 does not take a mapping proxy


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
    """How far the training is; all int64 `[*batch]` but for `cool_span`.

    A planned run cools down from its first step on; an open one, of which no end is known, may begin to at any step.

    Attributes:
        step: updates that the tensor has had.
        num_steps: the run's updates at its end; 0: no end is known, for rules with `open_ended`. None: as 0 everywhere.
        run_step: updates that the run has had, which are more where a tensor had no gradient at times; None: `step`.
        cool_start: the run's updates when its end became known, below `num_steps`; None: 0, as in planned runs.
        cool_span: steps from 0 to 1 of `progress`, floating; None: `num_steps - cool_start`.
    """

    step: Tensor
    num_steps: Tensor | None
    run_step: Tensor | None = None
    cool_start: Tensor | None = None
    cool_span: Tensor | None = None

    def count_steps(self) -> Tensor:
        """Updates that the run has had, int64 `[*batch]`.

        A schedule follows the run, though a tensor may have had fewer updates: it ends with the run.
        """
        return self.step if self.run_step is None else self.run_step

    def progress(self, dtype: torch.dtype) -> Tensor | None:
        """How much of the way to the known end the run has made, `[*batch]`, 0 where none is known; None: nowhere.

        Of a planned run, that is the share of its steps. It is above 1 beyond the end, and may be below 0 for tensors
        that have had fewer updates than the run; rules decide for themselves what that means.
        """
        if self.num_steps is None:
            return None
        if self.cool_start is None and self.cool_span is None:
            share = self.count_steps().to(dtype) / self.num_steps.to(dtype)
        else:
            start = 0 if self.cool_start is None else self.cool_start
            span = (self.num_steps - start if self.cool_span is None else self.cool_span).to(dtype)
            share = (span - (self.num_steps - self.count_steps()).to(dtype)) / span
        return torch.where(self.num_steps > 0, share, 0.0)

    def count_open_steps(self) -> Tensor:
        """Updates that the run has had with no end known, int64 `[*batch]`: 0 in planned runs, all in open ones."""
        if self.num_steps is None:
            return self.count_steps()
        return torch.where(self.num_steps > 0, 0 if self.cool_start is None else self.cool_start, self.count_steps())

    def map(self, function: Callable[[Tensor], Tensor]) -> Clock:
        """A clock with `function` of each tensor that is known, for joining parameters or picking one of them."""
        return Clock(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


class Elements(NamedTuple):
    """A parameter, or a part of it, as the stages on elements see it: they must not care which of the two it is.

    Chunks that fit into a cache, shards of a DTensor, stacks of equal small tensors and whole batches of tasks all come
    in this form.

    Attributes:
        g, p: gradient and parameter `[*batch, *shape]`.
        acc: accumulators and fields, `[*batch, (features,) *shape or 1s]`; some are made when they are read.
        layout: of the whole parameter.
        whole: this is the whole parameter, and the fields that a stage makes are kept for the next ones.
    """

    g: Tensor
    p: Tensor
    acc: Mapping[str, Tensor]
    layout: Layout
    whole: bool = False


class Sum(NamedTuple):
    """A sum over some axes of the elements at hand, from which the caller makes a mean over the whole parameter.

    A rule sees only chunks or shards of a parameter; sums can be added up over these and over processes, means cannot.

    Attributes:
        value: `[*batch, (features,) *shape]` with size 1 in the axes.
        axes: negative, of the parameter's layout.
    """

    value: Tensor
    axes: tuple[int, ...]


class Visit(NamedTuple):
    """What a stage on elements makes; whatever it leaves out stays as it was.

    Attributes:
        acc: new accumulators of these elements.
        sums: for the stage that decides next, by name.
        delta: the additive step `[*batch, *shape]`, of `move` alone.
        fields: tensors for the later stages of this step, if the elements are `whole`.
    """

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


class Finished(NamedTuple):
    """What `finish` makes of the whole step of a tensor.

    Attributes:
        delta: the step `[*batch, *shape]`.
        factor: on it, `[*batch, *shape or 1s]`: the caller multiplies where it writes. None: 1.
        acc: new accumulators of the whole tensor.
        numbers: `[*batch, features]` by name, for `Rule.review`.
    """

    delta: Tensor
    factor: Tensor | None = None
    acc: Mapping[str, Tensor] = NOTHING
    numbers: Mapping[str, Tensor] = NOTHING

    def multiply(self) -> Tensor:
        """The step with its factor."""
        return self.delta if self.factor is None else self.delta * self.factor


class AllTensors(NamedTuple):
    """All n parameters of a step at once, as `Rule.decide_together` sees them: numbers of each, never elements.

    Attributes:
        tensor_state: the accumulators of `Rule.tensor_keys`, `[*batch, n, features]`.
        means: of `measure`, or numbers of `finish`, `[*batch, count, ...]` for each tensor or group of `count` equal
            ones; n in all.
        layouts: of these groups.
        loss: training-batch loss `[*batch, 1 or n]`, or None; negated for tensors that are to ascend.
        clock: `[*batch, 1 or n]`.
    """

    tensor_state: Accumulators
    means: Sequence[Means]
    layouts: Sequence[Layout]
    loss: Tensor | None
    clock: Clock


class Memory(NamedTuple):
    """One parameter as it lies in memory, for code that makes a whole step by itself, without torch's operations.

    Attributes:
        g, p: `[*batch, *shape]`, each of the batch contiguous.
        acc: likewise.
        new_p, new_acc: what is to be written, in part of the step or all of it; they may be `p` and `acc` themselves.
        lr, weight_decay: of `p <- p + lr * step - lr * weight_decay * p`.
    """

    g: Tensor
    p: Tensor
    acc: Mapping[str, Tensor]
    new_p: Tensor
    new_acc: Mapping[str, Tensor]
    lr: float = 1.0
    weight_decay: float = 0.0


Finish = Callable[[Tensor, Callable[[], Elements]], Finished]
"""The whole step, and a function that has the whole tensor's elements with new accumulators -> what `finish` makes."""


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

    def expose(self, keys: Sequence[str]) -> Sequence[Memory] | None:
        """The memory of each of the parameters on the CPU, for one step that is then made there: float32, but for
        `compact_keys` in bfloat16.

        Args:
            keys: accumulators that the step writes.
        Returns:
            None where it lies otherwise, or more is to be done than to add the step.
        """

    def adopt(self, memories: Sequence[Memory]) -> None:
        """Take what has been written to the new tensors of `expose`, which may be the old ones."""

    def list_rows(self, key: str) -> Sequence[Tensor]:
        """The accumulator of one of the rule's `tensor_keys`, `[*batch, features]` of each of the parameters, without
        the dimension that stacked ones have.
        """

    def keep_rows(self, rows: Mapping[str, Sequence[Tensor]]) -> None:
        """As `keep`, for accumulators of `tensor_keys` in the form that `list_rows` gives them."""

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """Call the stage on all elements that are here, in as many parts as suits, and keep the new accumulators.

        Returns:
            The sums over the parts, by name; over processes they are added up by the caller.
        """

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Keep new accumulators for good, and fields for the rest of this step.

        Args:
            acc: of the whole parameter, or of what it shares; tensors that are left out stay.
            fields: found by later stages in `Elements.acc`, cut to the elements at hand.
        """

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Mapping[str, Tensor]:
        """As `visit`, for the stage whose delta is added to the parameter.

        Args:
            stage: `Rule.move`, with what was decided.
            finish: `Rule.finish`, which needs the whole tensor's delta at once; None for rules without it.
        Returns:
            `Finished.numbers`.
        """


def divide_sums(tensors: Sequence[Steppable], sums: Sequence[Mapping[str, Sum]]) -> list[Means]:
    """Means of sums for tensors that are wholly here; where processes hold parts, sums are added up first.

    Returns:
        For each tensor its means by name, of the same shapes as the sums.
    """
    return [
        {key: total.value / count_elements(total.axes, tensor.layout) for key, total in tensor_sums.items()}
        for tensor, tensor_sums in zip(tensors, sums, strict=True)
    ]


def count_elements(axes: tuple[int, ...], layout: Layout) -> int:
    """How many elements a mean over `axes` is taken of; at least 1."""
    return max(1, prod([layout.shape[axis] for axis in axes]))  # a list: torch.compile does not take generators here
