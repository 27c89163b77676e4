"""Small parameters of equal shape stepped together: the number of operations does not grow with their number.

A step copies them, their gradients and their state into tensors `[k, *shape]`, runs the rule's stages with k as a batch
dimension, and writes the results back. This costs less than one operation per parameter, and nothing between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lopt.apply import Apply
from lopt.rules.base import Accumulators, Elements, Finish, Visit, WholeTensor


class Bucket(WholeTensor):
    """See `lopt.rules.base.Steppable`. Nothing is written before `move`.

    Args:
        params: k parameters of one shape, dtype and device.
        g: their gradients `[k, *shape]`.
        accs: their accumulators in fp32.
        extras: for each what belongs to `apply.transform`.
        apply: how the step is added.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        g: Tensor,
        accs: Sequence[Accumulators],
        apply: Apply,
        extras: Sequence[Accumulators] = (),
    ) -> None:
        self.params, self.states, self.apply = params, accs, apply
        self.count: int | None = len(params)
        self.raw = torch.stack(list(params))
        self.old = _stack(accs)
        super().__init__(apply.read(g), self.raw.float(), self.old, 1)
        self.extras = extras

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """See `Steppable.move`."""
        delta = self.make_delta(stage, finish)
        if self.apply.transform is not None:
            extra = _stack(self.extras)
            delta, new = self.apply.transform(delta, self.g, extra)
            self._write(self.extras, new, extra)
        raw = self.raw.view(delta.shape)
        moved = self.apply.move(raw, delta).view(self.raw.shape)
        torch._foreach_copy_(list(self.params), list(moved.unbind(0)))
        self._write(self.states, self.acc, self.old)

    def _write(self, states: Sequence[Accumulators], new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Put stacked tensors back into the accumulators that they come from."""
        for key, value in new.items():
            if value is not old[key]:
                merged = self.apply.merge(value, old[key])
                torch._foreach_copy_([state[key] for state in states], list(merged.unbind(0)))


def _stack(states: Sequence[Accumulators]) -> Accumulators:
    """The accumulators of k parameters as tensors `[k, ...]`."""
    return {key: torch.stack([state[key] for state in states]) for key in (states[0] if states else ())}
