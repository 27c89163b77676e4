"""Small parameters of equal shape stepped together: the number of operations does not grow with their number.

Every stage copies them, their gradients and their state into tensors `[k, *shape]`, runs with k as a batch dimension,
and writes the results back. This costs less than one operation per parameter, and keeps nothing between the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lopt.optim.update import ParameterUpdate
from lopt.rules.layout import find_layout
from lopt.rules.stages import NOTHING, Accumulators, Elements, Finish, Sum, Visit


class StackedTensors:
    """k equal parameters as one `lopt.rules.stages.Steppable` with a dimension for them; all are updated in place.

    Args:
        params, grads: k parameters of one shape, dtype and device, and their gradients, of one dtype.
        states: their accumulators in fp32 or bf16.
        update: how the step is added.
        tensor_keys: names of accumulators that the stages on elements do not see.
        extras: for each what belongs to `update.transform`.
    """

    stacked = True

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Accumulators],
        update: ParameterUpdate,
        tensor_keys: Sequence[str] = (),
        extras: Sequence[Accumulators] = (),
    ) -> None:
        self.layout = find_layout(tuple(params[0].shape))
        self.count = len(params)
        self.batch: tuple[int, ...] = (len(params),)
        self.params, self.grads, self.update = list(params), list(grads), update
        self.acc, self.extra = StackedState(states), StackedState(extras)
        self.seen = [key for key in self.acc if key not in tensor_keys]
        self.fields: Accumulators = {}

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """Call a stage once on all k parameters, stacked in fp32, and write its new accumulators back.

        Returns:
            Sums `[k, ...]`, which are over the whole parameters, as these are never sharded.
        """
        visit, _ = self._call(stage)
        return visit.sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Write accumulators `[k, ...]` back into the k states, where gradients are live; keep fields for this step.

        Args:
            acc: by name; tensors that are left out stay.
            fields: of this step alone: no state has them.
        """
        # Where all are live, the old state is not even stacked.
        for key, value in acc.items():
            self.acc.write(key, value if self.update.live is None else self.update.merge(value, self.acc[key]))
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """Add the steps to the k parameters in place, by the operations of one step on a stack of them.

        Args:
            finish: called once for all of them, with the steps `[k, *shape]`.
        """
        visit, e = self._call(stage)
        delta = visit.delta
        assert delta is not None, "`move` makes the step"
        if finish is not None:
            finished = finish(delta, lambda: e._replace(acc=e.acc | {key: self.acc[key] for key in visit.acc}))
            self.keep(finished.acc)
            delta = finished.multiply()
        if self.update.transform is not None:
            # What the transform makes anew is written back, the rest stays; the copies here are never its memory.
            old = dict(self.extra)
            delta, new = self.update.transform(delta, e.g, old, False)
            for key, value in new.items():
                if value is not old[key]:
                    self.extra.write(key, self.update.merge(value, old[key]))
        # Parameters keep their dtype here, as the update rounds; a scalar has a dimension that the layout adds.
        raw = torch.stack(self.params)
        moved = self.update.move(raw.view(delta.shape), delta)
        torch._foreach_copy_(self.params, list(moved.view(raw.shape).unbind(0)))

    def _call(self, stage: Callable[[Elements], Visit]) -> tuple[Visit, Elements]:
        """Call the stage and keep the new accumulators."""
        shape = (*self.batch, *self.layout.shape)
        g = self.update.read(torch.stack(self.grads)).view(shape)
        old = {key: self.acc[key] for key in self.seen}
        e = Elements(g, torch.stack(self.params).float().view(shape), old | self.fields, self.layout)
        visit = stage(e)
        # `old` is at hand: `keep` would stack it a second time.
        for key, value in visit.acc.items():
            self.acc.write(key, self.update.merge(value, old[key]))
        return visit, e


class StackedState(Mapping[str, Tensor]):
    """The states of k parameters as fp32 tensors `[k, ...]`, made when they are asked for, so that none is kept.

    Args:
        states: with equal keys, dtypes and shapes; written to in place.
    """

    def __init__(self, states: Sequence[Accumulators]) -> None:
        self.states = states

    def __getitem__(self, key: str) -> Tensor:
        return torch.stack([state[key] for state in self.states]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0] if self.states else ())

    def __len__(self) -> int:
        return len(self.states[0]) if self.states else 0

    def write(self, key: str, value: Tensor) -> None:
        """Put a new value back into the k tensors under `key`, in place, rounded once to their dtype.

        Args:
            value: `[k, ...]`, in the order of the states.
        """
        torch._foreach_copy_([state[key] for state in self.states], list(value.unbind(0)))
