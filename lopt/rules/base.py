"""What a rule is: a pure update policy whose weights (the meta-weights) can be learned.

Rules see tensors with any number of leading batch dimensions (tasks, particles), never tasks or models.
Meta-weights may carry the same leading dimensions, one set per task, by `torch.func.functional_call`.

A rule is written once, as stages of one step, each named after what it does and limited in what it sees:

    measure          elements      old accumulators -> sums
    decide_together  all tensors   numbers of each tensor -> what is shared; the recurrent schedulers live here
    begin_step       clock         meta-weights -> what all tensors share
    update_lines     one tensor    means -> accumulators that rows or columns share
    update_state     elements      new accumulators -> sums
    decide           one tensor    means, meta-weights, clock -> what `move` needs
    move             elements      the step
    finish           one tensor    the whole step at once (orthogonalisation)
    review           all tensors   numbers of each step that was finished -> accumulators of `tensor_keys`

`step_tensors` calls them in this order, but where `step_on_host` makes the step by compiled code. `Rule.update` runs
them on whole tensors, purely; the optimizer runs the same stages in place, part by part. A rule that looks at single
elements only is shorter as an `ElementwiseRule`, one that looks at one tensor at a time as a `TensorRule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lopt.core.recorded import Recorded
from lopt.core.tensors import Params
from lopt.rules.layout import Layout, find_layout
from lopt.rules.stages import (
    PLACE,
    Accumulators,
    AllTensors,
    Clock,
    Decision,
    Elements,
    Finished,
    Means,
    State,
    Steppable,
    Sum,
    Visit,
    divide_sums,
)
from lopt.rules.tensor_group import TensorGroup
from lopt.rules.whole_tensor import WholeTensor


class Rule(Recorded, nn.Module, ABC):
    """A meta-optimizer. Its parameters are the meta-weights; `config` rebuilds it: `RULES[name](**config)`.

    Attributes:
        elementwise: the step of an element depends on that element alone.
        needs_loss: reads the training loss; without it, what depends on it stays as it was.
        needs_num_steps: cannot run without the planned number of steps.
        open_ended: follows a schedule for which the number of steps need not be known, now or ever (`open_schedule`).
        tensor_keys: accumulators that belong to a tensor as a whole, `[*batch, features]`; `PLACE`, `[*batch, 1]`, is
            filled in with the tensor's number in the model.
        line_keys: accumulators that rows or columns share; they start at 0.
        compact_keys: accumulators that may be kept in bfloat16.
        square_keys: accumulators that are averages of squares, so that none of their numbers is below 0.
        temporaries: numbers per element that `move` holds at once, beside state and parameter; sizes the chunks.
        decay_scale: factor on the user's weight decay, for rules whose `lr` has a step size of its own within.
        adamw_options: lr, betas and eps of AdamW where a user routes parameters to it beside this rule.
        feature_names: the inputs of the policy, in their order, if they have names; for people.
        quick_config: options of a small rule that can learn to go from 1 to 0 in fifteen steps; tests build it.

    >>> import torch
    >>> from torch import nn
    >>> from lopt.rules import Rule, Visit
    >>> class Descent(Rule):  # p <- p - lr g
    ...     name = "descent"
    ...     def __init__(self, lr: float = 0.5):
    ...         super().__init__()
    ...         self.lr = nn.Parameter(torch.tensor(lr))
    ...     def init_accumulators(self, p, layout):
    ...         return {}
    ...     def move(self, e, decided):
    ...         return Visit(delta=-self.lr * e.g)
    >>> rule, params = Descent(lr=0.25), {"w": torch.ones(2)}
    >>> rule.describe()
    'descent(lr=0.25)'
    >>> with torch.no_grad():
    ...     params, state = rule.update({"w": torch.ones(2)}, params, rule.init_state(params))
    >>> params["w"], int(state.step)
    (tensor([0.7500, 0.7500]), 1)
    """

    name: ClassVar[str]
    elementwise: bool = False
    needs_loss: bool = False
    needs_num_steps: bool = False
    open_ended: bool = False
    tensor_keys: tuple[str, ...] = ()
    line_keys: tuple[str, ...] = ()
    compact_keys: tuple[str, ...] = ()
    square_keys: tuple[str, ...] = ()
    temporaries: int = 0
    decay_scale: float = 1.0
    adamw_options: Mapping[str, Any] = MappingProxyType({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})
    feature_names: tuple[str, ...] = ()
    quick_config: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, **options: Any) -> None:
        """Options are those of each rule's own constructor; here none is left."""
        super().__init__(**options)

    # -- stages --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        """The accumulators before the first step of one parameter `[*batch, *layout.shape]`.

        Returns:
            Contiguous tensors of their own memory, `[*batch, (features,) *shape or 1s]`, or `[*batch, features]` for
            `tensor_keys`. None is called "step", which is the optimizer's.
        """

    def measure(self, e: Elements) -> Visit:
        """Sums that the step needs before anything is updated; their means go to `decide_together` and `update_lines`.

        The elements may be a part of the parameter; a sum says over which axes it goes, and parts are added up.
        """
        return Visit()

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        """What depends on all n tensors together; called for rules with `tensor_keys`.

        Returns:
            The new `tensor_state`, and what the tensors' later stages receive as `shared`: `[*batch, n, ...]`, of which
            each tensor gets its own part.
        """
        return {}, {}

    def begin_step(self, clock: Clock) -> Means:
        """What all tensors share and depends on the clock alone; the later stages find it in `shared`.

        Args:
            clock: `[*batch]`; where parameters have clocks of their own, this is called once for each of these.
        """
        return {}

    def update_lines(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, shared: Means) -> Decision:
        """Accumulators and fields that rows or columns share, from the means of `measure`; nothing is decided yet.
        Means have size 1 where they were taken; `acc` is from before the step.
        """
        return Decision()

    def update_state(self, e: Elements, shared: Means) -> Visit:
        """New accumulators of the elements, and sums over them whose means go to `decide`.

        It sees the accumulators from before the step but for those of `update_lines`; the later stages see its own.
        With `Elements.whole` it may return fields, which spare `move` from computing them again.
        """
        return Visit()

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        """What `move` and `finish` need of a tensor beside its elements, from the means of `update_state`.

        Args:
            means: `[*batch, (features,) *shape or 1s]`, with size 1 where they were taken.
            acc: new accumulators.
            clock: of this tensor, `[*batch]`.
            shared: what `decide_together` and `begin_step` made.
        """
        return Decision(decided=clock)

    @abstractmethod
    def move(self, e: Elements, decided: Any) -> Visit:
        """The step: the new parameters are `p + delta`. It sees new accumulators, and may return newer ones.

        A rule without `update_state` makes all its new accumulators here, in one pass over the elements. Arithmetic is
        fp32 whatever the parameter's dtype.
        """

    def finish(self, delta: Tensor, read: Callable[[], Elements], decided: Any, layout: Layout) -> Finished:
        """What becomes of the step of a whole tensor `[*batch, *shape]`, for which one tensor at a time needs memory.

        Args:
            read: makes the whole tensor's elements, with new accumulators; memory for a copy of all of them.
        """
        return Finished(delta)

    def review(self, tensors: AllTensors) -> Accumulators:
        """What each tensor remembers of its step, once all are made: accumulators of `tensor_keys`, `[*batch, n, ...]`.

        Arithmetic on few numbers costs as much for one tensor as for all, so that `finish` should leave it to this.

        Args:
            tensors: whose means are the numbers of `finish`; `tensor_state` is empty.
        """
        return {}

    def step_on_host(self, group: TensorGroup, loss: Tensor | None) -> bool:
        """The whole step by code that was compiled for the CPU, where a rule has some and it can be used.

        Args:
            group: of all the step's tensors; the new ones are kept there.
            loss: as in `AllTensors`.
        Returns:
            False: nothing is done, and the stages make the step, which define what it is.
        """
        return False

    @classmethod
    def has(cls, stage: str) -> bool:
        """Whether the rule overrides a stage, by the name of its method.

        Stages that a rule does not have cost nothing: neither a pass over the elements nor a collective.
        """
        return getattr(cls, stage) is not getattr(Rule, stage)

    def delegate(self, name: str, layout: Layout) -> Rule | None:
        """Another rule for the parameter `name`, if this one is not meant for it.

        Celo2 leaves vectors and embeddings to AdamW in this way. The answer must depend on name and layout alone, as
        it is asked once for the state and again for every step.
        """
        return None

    # -- whole tensors, purely -----------------------------------------------------------------------------------------

    def init_state(self, params: Params, batch_ndim: int = 0) -> State:
        """The state before the first step: zero steps made, and the accumulators of every parameter.

        Args:
            params: `[*batch, *shape]` by name; only their shapes, dtype and device matter to most rules.
            batch_ndim: how many of the dimensions are tasks or particles.
        """
        accumulators = {}
        batch: torch.Size = torch.Size()
        device = None
        for place, (name, p) in enumerate(params.items()):
            batch, device = p.shape[:batch_ndim], p.device
            layout = find_layout(tuple(p.shape[batch_ndim:]))
            rule = self.delegate(name, layout) or self
            accumulators[name] = rule.init_accumulators(p.detach().contiguous().reshape(*batch, *layout.shape), layout)
            if PLACE in rule.tensor_keys:
                accumulators[name][PLACE].fill_(place)
        return State(torch.zeros(batch, dtype=torch.int64, device=device), accumulators)

    @property
    def initial_params(self) -> Params | None:
        """The parameters that tasks start from, by name, where they are meta-weights; None: each task's own."""
        return None

    def update(
        self,
        grads: Params,
        params: Params,
        state: State,
        loss: Tensor | None = None,
        num_steps: Tensor | None = None,
        cool_start: Tensor | None = None,
    ) -> tuple[Params, State]:
        """One step of the policy; pure, differentiable in the meta-weights.

        Args:
            grads: dL/dparams, one tensor `[*batch, *shape]` per name, same shape and dtype as `params`.
            state: from `init_state` or the previous call; `state.step` counts from 0.
            loss: training-batch loss `[*batch]`, for rules that read it.
            num_steps: planned number of steps, int64 `[*batch]`, for rules that read it; 0: no end is known, for rules
                with `open_ended`, to which None says so of the whole batch.
            cool_start: steps after which `num_steps` became known, int64 `[*batch]`; None: it was from the start.
        Returns:
            New parameters and new state; nothing is modified in place.
        Raises:
            KeyError: a parameter has no gradient (leave the parameter out instead of passing None).
            ValueError: the rule needs `num_steps` and there is none.
        """
        clock = Clock(state.step, num_steps, cool_start=cool_start)
        acc, ndim = state.accumulators, state.step.ndim
        tensors = {name: WholeTensor(grads[name], p, acc[name], ndim) for name, p in params.items()}
        # Parameters that a rule delegates are stepped by another one, with a schedule of its own.
        groups: dict[Rule, list[WholeTensor]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(self.delegate(name, tensor.layout) or self, []).append(tensor)
        for rule, members in groups.items():
            step_tensors(rule, members, None if loss is None else loss[..., None], clock)
        new_params = {name: tensor.p.reshape(params[name].shape) for name, tensor in tensors.items()}
        accumulators = {name: tensor.acc for name, tensor in tensors.items()}
        return new_params, State(state.step + 1, accumulators)

    @property
    def has_schedule(self) -> bool:
        """Whether it follows a schedule over the training, with a known end or without one."""
        return self.needs_num_steps or self.open_ended

    def meta_weights(self) -> dict[str, nn.Parameter]:
        """What meta-training changes, by name: parameters with `requires_grad`, of this rule and of rules within it."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Params, State]:
        """`update`, as `torch.func.functional_call` calls it: with other meta-weights, or stacks of them for slots."""
        return self.update(*args, **kwargs)

    def describe(self) -> str:
        """One line with the rule's name and configuration, for logs, error messages and result tables."""
        config = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"{self.name}({config})"


def step_tensors(
    rule: Rule,
    tensors: Sequence[Steppable],
    loss: Tensor | None,
    clock: Clock,
    to_means: Callable[[Sequence[Steppable], Sequence[Mapping[str, Sum]]], list[Means]] = divide_sums,
) -> None:
    """One step of `tensors` under `rule`: all its stages, in their order.

    Args:
        loss: `[*batch, 1 or n]` or None.
        clock: `[*batch]`, or `[*batch, n]` where each of the n parameters has its own.
        to_means: makes means of the sums; twice per step, so that sums over processes are two collectives.
    Raises:
        ValueError: the rule needs `num_steps` and there is none.
    """
    if not tensors:
        return
    if rule.needs_num_steps and clock.num_steps is None:
        raise ValueError(f"rule {rule.name!r} needs the planned number of steps: pass num_steps")
    group = TensorGroup(tensors, clock)
    if rule.step_on_host(group, loss):
        return
    # Loops are over tensors and not over stages: sums are two collectives per step, whatever the number of tensors.
    means = to_means(tensors, group.visit(rule, "measure", [rule.measure] * len(tensors)))
    shared: list[Means] = [{} for _ in tensors]
    if rule.tensor_keys:
        state, together = rule.decide_together(group.gather(rule.tensor_keys, means, loss))
        group.keep(state)
        shared = [group.take(i, together) for i in range(len(tensors))]
    clocks = group.list_clocks()
    by_clock = [rule.begin_step(one) for one in clocks]
    shared = [tensor_shared | by_clock[i % len(by_clock)] for i, tensor_shared in enumerate(shared)]
    for tensor, tensor_means, tensor_shared in zip(tensors, means, shared, strict=True):
        tensor.keep(*rule.update_lines(tensor_means, tensor.acc, tensor.layout, tensor_shared)[:2])
    updates = [partial(rule.update_state, shared=tensor_shared) for tensor_shared in shared]
    means = to_means(tensors, group.visit(rule, "update_state", updates))
    numbers = []
    for i, tensor in enumerate(tensors):
        acc, fields, decided = rule.decide(means[i], tensor.acc, tensor.layout, clocks[i % len(clocks)], shared[i])
        tensor.keep(acc, fields)
        finish = partial(rule.finish, decided=decided, layout=tensor.layout) if rule.has("finish") else None
        numbers.append(tensor.move(partial(rule.move, decided=decided), finish))
    if rule.has("review"):
        group.keep(rule.review(group.gather((), numbers, loss)))
