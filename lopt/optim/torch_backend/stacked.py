"""Small parameters of equal shape stepped together: the number of operations does not grow with their number.

Every stage copies them, their gradients and what it reads of their state into tensors `[k, *shape]`, runs with k as a
batch dimension, and writes the results back. This costs less than one operation per parameter, and keeps nothing
between the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lopt.optim.torch_backend.chunked import expose_in_place
from lopt.optim.update import ParameterUpdate
from lopt.rules.layout import find_layout
from lopt.rules.stages import NOTHING, Accumulators, Elements, Finish, Finished, Memory, Sum, Visit


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
        self.states, self.extras, self.tensor_keys = states, extras, tensor_keys
        self.fields: Accumulators = {}

    @property
    def acc(self) -> StackedState:
        """The accumulators, stacked for as long as the caller holds them."""
        return StackedState(self.states)

    def expose(self, keys: Sequence[str]) -> list[Memory] | None:
        """Where each of the k parameters lies, without a stack: they are stepped in place."""
        return expose_in_place(self.params, self.grads, self.states, self.update)

    def adopt(self, memories: Sequence[Memory]) -> None:
        """Nothing is left to do: what was exposed is written in place."""

    def list_rows(self, key: str) -> list[Tensor]:
        """Numbers of each of the k tensors under `key`, `[features]`, as the states hold them."""
        return [state[key] for state in self.states]

    def keep_rows(self, rows: Mapping[str, Sequence[Tensor]]) -> None:
        """Write numbers of each of the k tensors back, where gradients are live."""
        if self.update.live is None:
            olds = [state[key] for key in rows for state in self.states]
            torch._foreach_copy_(olds, [row for values in rows.values() for row in values])
        else:
            self.keep({key: torch.stack(list(values)) for key, values in rows.items()})

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """Call a stage once on all k parameters, stacked in fp32, and write its new accumulators back.

        Returns:
            Sums `[k, ...]`, which are over the whole parameters, as these are never sharded.
        """
        e, state = self._read()
        visit = stage(e)
        self._write(state, visit.acc)
        return visit.sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Write accumulators `[k, ...]` back into the k states, where gradients are live; keep fields for this step.

        Args:
            acc: by name; tensors that are left out stay.
            fields: of this step alone: no state has them.
        """
        self._write(self.acc, acc)
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Mapping[str, Tensor]:
        """Add the steps to the k parameters in place, by the operations of one step on a stack of them.

        Args:
            finish: called once for all of them, with the steps `[k, *shape]`.
        """
        e, state = self._read()
        visit = stage(e)
        self._write(state, visit.acc)
        delta = visit.delta
        assert delta is not None, "`move` makes the step"
        # The accumulators of `e` are those that were written.
        finished = Finished(delta) if finish is None else finish(delta, lambda: e)
        self._write(state, finished.acc)
        delta = finished.multiply()
        if self.update.transform is not None:
            # What the transform makes anew is written back, the rest stays; the copies here are never its memory.
            extra = StackedState(self.extras)
            old = dict(extra)
            delta, new = self.update.transform(delta, e.g, old, False)
            self._write(extra, {key: value for key, value in new.items() if value is not old[key]})
        # Parameters keep their dtype here, as the update rounds.
        p = e.p if self.params[0].dtype == e.p.dtype else torch.stack(self.params).view(delta.shape)
        moved = self.update.move(p, delta)
        # A scalar has a dimension that the layout adds.
        torch._foreach_copy_(self.params, list(moved.view(self.count, *self.params[0].shape).unbind(0)))
        return finished.numbers

    def _read(self) -> tuple[Elements, StackedState]:
        """All k parameters for one stage, and the state that is behind what the stage sees of it."""
        shape = (*self.batch, *self.layout.shape)
        g = self.update.read(torch.stack(self.grads)).view(shape)
        state = StackedState(self.states, self.fields, self.tensor_keys)
        return Elements(g, torch.stack(self.params).float().view(shape), state, self.layout), state

    def _write(self, state: StackedState, acc: Mapping[str, Tensor]) -> None:
        """Write new accumulators back, where gradients are live; where all are, the old ones are not even stacked."""
        for key, value in acc.items():
            state.write(key, value if self.update.live is None else self.update.merge(value, state.stack(key)))


class StackedState(Mapping[str, Tensor]):
    """The states of k parameters as fp32 tensors `[k, ...]`, each made when it is first asked for.

    Args:
        states: with equal keys, dtypes and shapes; written to in place.
        fields: tensors `[k, ...]` of this step, which no state has.
        hidden: keys of the states that are not seen.
    """

    def __init__(
        self, states: Sequence[Accumulators], fields: Mapping[str, Tensor] = NOTHING, hidden: Sequence[str] = ()
    ) -> None:
        self.states, self.stacks = states, dict(fields)
        self.names = dict.fromkeys([*(key for key in (states[0] if states else ()) if key not in hidden), *fields])

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        return self.stack(key)

    def __contains__(self, key: object) -> bool:
        return key in self.names  # without a copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def stack(self, key: str) -> Tensor:
        """What is under `key`, hidden or not."""
        if key not in self.stacks:
            self.stacks[key] = torch.stack([state[key] for state in self.states]).float()
        return self.stacks[key]

    def write(self, key: str, value: Tensor) -> None:
        """Put a new value back into the k tensors under `key`, in place, rounded once to their dtype.

        Args:
            value: `[k, ...]`, in the order of the states; what is read from now on.
        """
        olds = [state[key] for state in self.states]
        torch._foreach_copy_(olds, list(value.unbind(0)))
        self.stacks[key] = value.to(olds[0].dtype).float()
