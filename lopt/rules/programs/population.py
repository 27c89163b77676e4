"""One step of many slots, each with parameters, state and meta-weights of its own, by the same few launches.

The rule's meta-weights are replaced by stacks `[T, ...]` while its program reads them. Everything that is addressed
stays where it is, and nothing is waited for, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from lopt_kernels.launching.parameters import Items, Rates
from lopt_kernels.launching.segments import find_alignment, upload
from torch import Tensor, nn
from torch.func import functional_call

from lopt.core.tensors import Params
from lopt.rules import Clock, Rule, State, find_layout
from lopt.rules.programs.base import Program
from lopt.rules.programs.registry import FUSED, find_obstacle
from lopt.rules.programs.views import ParameterView

T = TypeVar("T")


class PopulationStep:
    """The step of T slots, in place.

    Args:
        rule: on the slots' device.
        grads, params: float32 `[T, *shape]` by name, each slot's entries contiguous; they stay where they are.
        state: likewise; its accumulators are contiguous.
        weights: float32 stacks `[T, ...]` of all parameters of the rule, by name; they stay where they are, too.
    """

    def __init__(self, rule: Rule, grads: Params, params: Params, state: State, weights: Params) -> None:
        self.state, self.weights = state, weights
        self._bound = _Bound(rule)
        groups: dict[Rule, list[str]] = {}
        for name, p in params.items():
            groups.setdefault(rule.delegate(name, find_layout(tuple(p.shape[1:]))) or rule, []).append(name)
        self.groups = self._call(
            lambda: [
                _Group(owner, {k: grads[k] for k in names}, {k: params[k] for k in names}, state)
                for owner, names in groups.items()
            ]
        )

    def load(self) -> None:
        """Read the stacks of meta-weights, whose values have changed, to where the launches have them.

        To be called after every such change, before the next step; a step that was captured in a graph stays valid.
        """

        def load_groups() -> None:
            for group in self.groups:
                group.program.load()

        self._call(load_groups)

    def step(self, loss: Tensor, num_steps: Tensor) -> None:
        """Move all parameters and accumulators by one step, given losses and horizons `[T]`; not the counter."""

        def step_groups() -> None:
            for group in self.groups:
                group.step(self.state.step, loss, num_steps)

        self._call(step_groups)

    def _call(self, function: Callable[[], T]) -> T:
        """What `function` returns while the rule has the stacks for meta-weights."""
        result: T = functional_call(self._bound, {f"rule.{k}": w for k, w in self.weights.items()}, (function,))
        return result


class _Bound(nn.Module):
    """Calls functions that use the rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class _Group:
    """The parameters of all slots that one rule steps: items are numbered slot by slot."""

    def __init__(self, rule: Rule, grads: Params, params: Params, state: State) -> None:
        first = next(iter(params.values()))
        slots, count, device = len(first), len(first) * len(params), first.device
        views = [
            _make_view(slot * len(params) + i, slot, p[slot], {k: x[slot] for k, x in state.accumulators[name].items()})
            for slot in range(slots)
            for i, (name, p) in enumerate(params.items())
        ]
        # Kernels read gradients by address: these stay valid, as the slots' buffers never move.
        addresses = [grads[name][slot].data_ptr() for slot in range(slots) for name in params]
        ones, zeros = (
            torch.ones(count, device=device, dtype=torch.float32),
            torch.zeros(count, device=device, dtype=torch.float32),
        )
        self.items = Items(
            grads=upload(addresses, torch.int64, device),
            rates=Rates(ones, zeros, ones),
            live=ones.bool(),
            steps=torch.zeros(count, dtype=torch.int64, device=device),
            seeds=None,
            dtype=torch.float32,
            align=find_alignment(addresses),
        )
        self.needs_num_steps, self.slots = rule.needs_num_steps, slots
        self.program: Program = FUSED[rule.name](rule, [views], count, slots)

    def step(self, step: Tensor, loss: Tensor, num_steps: Tensor) -> None:
        """One step of these parameters in place, given steps made, losses and horizons `[T]`."""
        steps = self.items.steps.view(self.slots, -1)
        steps.copy_(step[:, None])
        totals = num_steps[:, None].expand_as(steps).flatten() if self.needs_num_steps else None
        self.program.run([self.items], False, loss[:, None], Clock(self.items.steps, totals))


def _make_view(number: int, slot: int, p: Tensor, state: Mapping[str, Tensor]) -> ParameterView:
    layout = find_layout(tuple(p.shape))
    return ParameterView(number, p.view(layout.shape), dict(state), layout, tuple(range(layout.ndim)), None, slot)


def find_population_obstacle(rule: Rule, params: Mapping[str, tuple[int, ...]], device: torch.device) -> str | None:
    """Why there is no such step for a rule on parameters of these shapes, by name, or None if there is one."""
    owners = {rule.delegate(name, find_layout(shape)) or rule for name, shape in params.items()}
    return next(
        filter(None, (find_obstacle(owner, device) for owner in sorted(owners, key=lambda owner: owner.name))), None
    )
