"""The tensors of one step together: their numbers joined for a rule that looks at all of them, and split again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt.rules.stages import NOTHING, Accumulators, AllTensors, Clock, Elements, Means, Steppable, Sum, Visit

if TYPE_CHECKING:
    from lopt.rules.base import Rule


class TensorGroup:
    """The tensors of a step, whose numbers are joined to `[*batch, n, ...]` for a rule and split again."""

    def __init__(self, tensors: Sequence[Steppable], clock: Clock) -> None:
        self.tensors = tensors
        self.dim = len(tensors[0].batch) - tensors[0].stacked  # of the n parameters, behind the batch dimensions
        self.starts = [0, *accumulate(tensor.count for tensor in tensors)]
        one_clock = clock.step.ndim == self.dim
        self.clock = clock.map(lambda x: x[..., None]) if one_clock else clock
        self.given = clock if one_clock else None

    def list_clocks(self) -> list[Clock]:
        """Every tensor's, `[*batch]`, or `[*batch, count]`; a single one where all have the same."""
        if self.given:
            return [self.given]
        return [self.clock.map(partial(self._take, i)) for i in range(len(self.tensors))]

    def visit(
        self, rule: Rule, name: str, stages: Sequence[Callable[[Elements], Visit]]
    ) -> Sequence[Mapping[str, Sum]]:
        """The sums of a stage on every tensor's elements; a stage that the rule does not have is not called."""
        if not rule.has(name):
            return [NOTHING] * len(self.tensors)
        return [tensor.visit(stage) for tensor, stage in zip(self.tensors, stages, strict=True)]

    def gather(
        self, tensor_keys: Sequence[str], means: Sequence[Mapping[str, Tensor]], loss: Tensor | None
    ) -> AllTensors:
        """Everything that there is to know of all tensors together.

        Args:
            means: of each tensor; none where they are known otherwise.
        """
        return AllTensors(
            # One copy for all tensors: stacks of their own would be one for each group of equal ones.
            {
                key: torch.stack([row for tensor in self.tensors for row in tensor.list_rows(key)], self.dim)
                for key in tensor_keys
            },
            [{key: self._lift(i, value) for key, value in one.items()} for i, one in enumerate(means)],
            [tensor.layout for tensor in self.tensors],
            loss,
            self.clock,
        )

    def keep(self, state: Accumulators) -> None:
        """Give every tensor its rows of new accumulators of `tensor_keys`."""
        rows = {key: value.unbind(self.dim) for key, value in state.items()}
        for tensor, start in zip(self.tensors, self.starts, strict=False):  # behind the last start is the end
            tensor.keep_rows({key: value[start : start + tensor.count] for key, value in rows.items()})

    def take(self, i: int, joined: Mapping[str, Tensor]) -> Means:
        """One tensor's part of `[*batch, n, ...]`; undoes `gather`."""
        return {key: self._take(i, value) for key, value in joined.items()}

    def _lift(self, i: int, x: Tensor) -> Tensor:
        return x if self.tensors[i].stacked else x.unsqueeze(self.dim)

    def _take(self, i: int, x: Tensor) -> Tensor:
        tensor, start = self.tensors[i], self.starts[i]
        return x.narrow(self.dim, start, tensor.count) if tensor.stacked else x.select(self.dim, start)
