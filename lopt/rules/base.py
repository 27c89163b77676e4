"""What a rule is: a pure update policy whose weights (the meta-weights) can be learned.

Rules see tensors with any number of leading batch dimensions (tasks, particles), never tasks or models.
Meta-weights may carry the same leading dimensions, one set per task, by `torch.func.functional_call`.

A rule is written once, as stages of one step:

    prepare       -             meta-weights, clock -> terms that all tensors share
    measure       elements      old accumulators -> sums
    fold_tensors  all tensors   one row of numbers per tensor -> their terms; the recurrent schedulers live here
    fold_lines    one tensor    means -> accumulators that rows or columns share
    accumulate    elements      new accumulators -> sums
    fold          one tensor    means, meta-weights, clock -> the terms of `emit`
    emit          elements      the step
    finish        one tensor    the whole step at once (orthogonalisation)

`step_tensors` calls them in this order. `Rule.update` runs them on whole tensors, purely;
`lopt.optim.torch_backend.chunked` runs the same stages in place, part by part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lopt.core.tensors import Params
from lopt.rules.layout import Layout, find_layout

Accumulators = dict[str, Tensor]
Means = dict[str, Tensor]
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class State(NamedTuple):
    """What a rule remembers between steps.

    Attributes:
        step: int64 `[*batch]`, updates made so far. Its shape tells the batch dimensions of all the rest.
        accumulators: for each parameter name a dict of tensors: `[*batch, (features,) *shape]`, with dimensions of 1
            where elements share a number, or `[*batch, features]` for the rule's `row_keys`. A scalar has shape (1,).
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


class Fold(NamedTuple):
    """What a stage on a tensor's sums makes.

    Attributes:
        acc: new accumulators.
        fields: tensors `[*batch, (features,) *shape or 1s]` that the later stages of this step find in `Elements.acc`.
        terms: all else that the next stage needs.
    """

    acc: Mapping[str, Tensor] = NOTHING
    fields: Mapping[str, Tensor] = NOTHING
    terms: Any = None


class Rule(nn.Module, ABC):
    """A meta-optimizer. Its parameters are the meta-weights; `config` rebuilds it: `RULES[name](**config)`.

    Attributes:
        elementwise: the step of an element depends on that element alone.
        needs_loss: reads the training loss; without it, what depends on it stays as it was.
        needs_num_steps: cannot run without the planned number of steps.
        row_keys: accumulators that belong to a tensor as a whole, `[*batch, features]`.
        line_keys: accumulators that rows or columns share; they start at 0.
        compact_keys: accumulators that may be kept in bfloat16.
        temporaries: numbers per element that `emit` holds at once, beside state and parameter; sizes the chunks.
        decay_scale: factor on the user's weight decay, for rules whose `lr` has a step size of its own within.
        adamw_options: lr, betas and eps of AdamW where a user routes parameters to it beside this rule.
        feature_names: the inputs of the policy, in their order, if they have names; for people.
    """

    name: ClassVar[str]
    elementwise: bool = False
    needs_loss: bool = False
    needs_num_steps: bool = False
    row_keys: tuple[str, ...] = ()
    line_keys: tuple[str, ...] = ()
    compact_keys: tuple[str, ...] = ()
    temporaries: int = 0
    decay_scale: float = 1.0
    adamw_options: Mapping[str, Any] = MappingProxyType({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})
    feature_names: tuple[str, ...] = ()

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    # -- stages --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        """The accumulators before the first step of one parameter `[*batch, *layout.shape]`; none is called "step"."""

    def prepare(self, clock: Clock) -> Means:
        """Terms that all tensors share; `fold_lines`, `accumulate` and `fold` find them in theirs.

        Args:
            clock: `[*batch]`; where parameters have clocks of their own, this is called once for each of these.
        """
        return {}

    def measure(self, e: Elements) -> Visit:
        """Sums that the step needs before anything is updated."""
        return Visit()

    def fold_tensors(
        self,
        rows: Accumulators,
        means: Sequence[Means],
        layouts: Sequence[Layout],
        loss: Tensor | None,
        clock: Clock,
    ) -> tuple[Accumulators, Means]:
        """What depends on all n tensors together; called for rules with `row_keys`.

        Args:
            rows: the accumulators of `row_keys`, `[*batch, n, features]`.
            means: of `measure`, `[*batch, count, ...]` for each tensor or group of `count` equal ones; n in all.
            layouts: of these groups.
            loss: training-batch loss `[*batch, 1]`, or None.
            clock: `[*batch, 1 or n]`.
        Returns:
            New rows, and terms `[*batch, n, ...]` for the tensors' `accumulate` and `fold`.
        """
        return {}, {}

    def fold_lines(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, terms: Means) -> Fold:
        """Accumulators and fields that rows or columns share, from the means of `measure` and the tensor's terms."""
        return Fold()

    def accumulate(self, e: Elements, terms: Means) -> Visit:
        """New accumulators of the elements and sums over them, given the tensor's terms from `fold_tensors`."""
        return Visit()

    def fold(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, terms: Means) -> Fold:
        """What `emit` and `finish` use, from the means of `accumulate` and the terms of `fold_tensors`."""
        return Fold(terms=clock)

    @abstractmethod
    def emit(self, e: Elements, terms: Any) -> Visit:
        """The step: the new parameters are `p + delta`."""

    def finish(self, delta: Tensor, terms: Any, layout: Layout) -> tuple[Tensor, Tensor]:
        """The step of a whole tensor `[*batch, *shape]` and a factor `[*batch, *shape or 1s]` on it.

        Rules that have this stage need memory for the step of one whole tensor.
        """
        return delta, delta.new_ones([1] * layout.ndim)

    @classmethod
    def has(cls, stage: str) -> bool:
        """Whether the rule has a stage of its own; others are not called."""
        return getattr(cls, stage) is not getattr(Rule, stage)

    def delegate(self, name: str, layout: Layout) -> Rule | None:
        """Another rule for the parameter `name`, if this one is not meant for it."""
        return None

    # -- whole tensors, purely -----------------------------------------------------------------------------------------

    def init_state(self, params: Params, batch_ndim: int = 0) -> State:
        """The state before the first step, for parameters `[*batch, *shape]` with `batch_ndim` batch dimensions."""
        accumulators = {}
        batch: torch.Size = torch.Size()
        device = None
        for name, p in params.items():
            batch, device = p.shape[:batch_ndim], p.device
            layout = find_layout(tuple(p.shape[batch_ndim:]))
            rule = self.delegate(name, layout) or self
            accumulators[name] = rule.init_accumulators(p.detach().contiguous().reshape(*batch, *layout.shape), layout)
        return State(torch.zeros(batch, dtype=torch.int64, device=device), accumulators)

    def update(
        self,
        grads: Params,
        params: Params,
        state: State,
        loss: Tensor | None = None,
        num_steps: Tensor | None = None,
    ) -> tuple[Params, State]:
        """One step of the policy; pure, differentiable in the meta-weights.

        Args:
            grads: dL/dparams, one tensor `[*batch, *shape]` per name, same shape and dtype as `params`.
            params: the current parameters.
            state: from `init_state` or the previous call; `state.step` counts from 0.
            loss: training-batch loss `[*batch]`, for rules that read it.
            num_steps: planned number of steps, int64 `[*batch]`, for rules that read it.
        Returns:
            New parameters and new state; nothing is modified in place.
        Raises:
            KeyError: a parameter has no gradient (leave the parameter out instead of passing None).
            ValueError: the rule needs `num_steps` and there is none.
        """
        clock = Clock(state.step, num_steps)
        tensors = {
            name: WholeTensor(grads[name], p, state.accumulators[name], state.step.ndim) for name, p in params.items()
        }
        groups: dict[Rule, list[WholeTensor]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(self.delegate(name, tensor.layout) or self, []).append(tensor)
        for rule, members in groups.items():
            step_tensors(rule, members, loss, clock)
        new_params = {name: tensor.p.reshape(params[name].shape) for name, tensor in tensors.items()}
        accumulators = {name: tensor.acc for name, tensor in tensors.items()}
        return new_params, State(state.step + 1, accumulators)

    def meta_weights(self) -> dict[str, nn.Parameter]:
        """The meta-weights that are learned, by name: parameters with `requires_grad`."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Params, State]:
        """`update`, under the name that `torch.func.functional_call` calls."""
        return self.update(*args, **kwargs)

    def describe(self) -> str:
        """One line: the rule's name and configuration."""
        config = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"{self.name}({config})"


class Steppable(Protocol):
    """One parameter, or several of equal shape, during one step: it owns its memory and how it is walked through.

    Attributes:
        layout: of the whole parameter, of which a process may hold a part.
        acc: accumulators, `[*batch, ...]`.
        batch: leading dimensions of all its tensors.
        count: how many parameters it holds, in the last of the `batch` dimensions; None: one, without a dimension.
    """

    layout: Layout
    batch: tuple[int, ...]
    count: int | None

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


def step_tensors(
    rule: Rule,
    tensors: Sequence[Steppable],
    loss: Tensor | None,
    clock: Clock,
    to_means: Callable[[Sequence[Steppable], Sequence[Mapping[str, Sum]]], list[Means]] = divide_sums,
) -> None:
    """One step of `tensors` under `rule`: all its stages, in their order.

    Args:
        loss: `[*batch]` or None.
        clock: `[*batch]`, or `[*batch, n]` where each of the n parameters has its own.
        to_means: makes means of the sums; twice per step, so that sums over processes are two collectives.
    Raises:
        ValueError: the rule needs `num_steps` and there is none.
    """
    if not tensors:
        return
    if rule.needs_num_steps and clock.num_steps is None:
        raise ValueError(f"rule {rule.name!r} needs the planned number of steps: pass num_steps")
    dim = len(tensors[0].batch) - (tensors[0].count is not None)
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + (tensor.count or 1))

    def lift(i: int, x: Tensor) -> Tensor:
        """One tensor's `[*batch, ...]` -> `[*batch, count, ...]`."""
        return x.unsqueeze(dim) if tensors[i].count is None else x

    def take(i: int, x: Tensor) -> Tensor:
        """One tensor's part of all parameters' `[*batch, n, ...]`; the inverse of `lift`."""
        count = tensors[i].count
        return x.select(dim, starts[i]) if count is None else x.narrow(dim, starts[i], count)

    indices = range(len(tensors))
    clocks, alike = [clock] * len(tensors), clock.step.ndim == dim
    if not alike:
        clocks = [clock.map(partial(take, i)) for i in indices]
    else:
        clock = clock.map(lambda x: x[..., None])
    nothing: Mapping[str, Sum] = {}
    means = to_means(tensors, [tensor.visit(rule.measure) if rule.has("measure") else nothing for tensor in tensors])
    terms: Means = {}
    if rule.row_keys:
        rows = {key: torch.cat([lift(i, tensors[i].acc[key]) for i in indices], dim) for key in rule.row_keys}
        lifted = [{key: lift(i, value) for key, value in means[i].items()} for i in indices]
        layouts = [tensor.layout for tensor in tensors]
        new, terms = rule.fold_tensors(rows, lifted, layouts, None if loss is None else loss[..., None], clock)
        for i in indices:
            tensors[i].keep({key: take(i, value) for key, value in new.items()})
    shared = [rule.prepare(c) for c in (clocks[:1] if alike else clocks)]
    own = [{key: take(i, value) for key, value in terms.items()} | shared[0 if alike else i] for i in indices]
    for i, tensor in enumerate(tensors):
        tensor.keep(*rule.fold_lines(means[i], tensor.acc, tensor.layout, own[i])[:2])
    stages = [partial(rule.accumulate, terms=own[i]) for i in indices]
    means = to_means(tensors, [tensors[i].visit(stages[i]) if rule.has("accumulate") else nothing for i in indices])
    for i, tensor in enumerate(tensors):
        acc, fields, folded = rule.fold(means[i], tensor.acc, tensor.layout, clocks[i], own[i])
        tensor.keep(acc, fields)
        finish = partial(rule.finish, terms=folded, layout=tensor.layout) if rule.has("finish") else None
        tensor.move(partial(rule.emit, terms=folded), finish)


class WholeTensor:
    """A parameter `[*batch, *shape]` stepped at once; nothing is modified in place. See `Steppable`."""

    count: int | None = None

    def __init__(self, g: Tensor, p: Tensor, acc: Accumulators, batch_ndim: int) -> None:
        self.batch = tuple(p.shape[:batch_ndim])
        self.layout = find_layout(tuple(p.shape[batch_ndim:]))
        self.acc = dict(acc)
        self.fields: Accumulators = {}
        self.g, self.p = (x.reshape(*self.batch, *self.layout.shape) for x in (g, p))

    def _call(self, stage: Callable[[Elements], Visit]) -> Visit:
        visit = stage(Elements(self.g, self.p, self.acc | self.fields, self.layout, whole=True))
        self.acc |= visit.acc
        self.fields |= visit.fields
        return visit

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """See `Steppable.visit`."""
        return self._call(stage).sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """See `Steppable.keep`."""
        self.acc |= acc
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """See `Steppable.move`."""
        self.p = self.p + self.make_delta(stage, finish)

    def make_delta(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Tensor:
        """The step `[*batch, *shape]`."""
        delta = self._call(stage).delta
        assert delta is not None, "`emit` makes the step"
        if finish is not None:
            delta, factor = finish(delta)
            delta = delta * factor
        return delta


def count_elements(axes: tuple[int, ...], layout: Layout) -> int:
    """How many elements a mean over `axes` is taken of; at least 1."""
    return max(1, prod([layout.shape[axis] for axis in axes]))  # a list: torch.compile does not take generators here
