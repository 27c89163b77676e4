"""A parameter that is stepped at once, as autograd has to see it: how `Rule.update` walks through a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lopt.core.tensors import are_plain
from lopt.rules.layout import find_layout
from lopt.rules.stages import NOTHING, Accumulators, Elements, Finish, Finished, Memory, Sum, Visit


class WholeTensor:
    """A parameter `[*batch, *shape]` that is stepped at once, as a new tensor: how `Rule.update` walks through a step.

    It is the `Steppable` for meta-training, where autograd must see every operation and tasks come in batches. The
    optimizer has others, which go through memory in chunks and in place; all give a rule's stages the same elements.
    """

    count = 1
    stacked = False

    def __init__(self, g: Tensor, p: Tensor, acc: Accumulators, batch_ndim: int) -> None:
        self.batch = tuple(p.shape[:batch_ndim])
        self.layout = find_layout(tuple(p.shape[batch_ndim:]))
        self.acc = dict(acc)
        self.fields: Accumulators = {}
        self.g, self.p = (x.reshape(*self.batch, *self.layout.shape) for x in (g, p))

    def _read(self) -> Elements:
        return Elements(self.g, self.p, self.acc | self.fields, self.layout, whole=True)

    def _call(self, stage: Callable[[Elements], Visit]) -> Visit:
        visit = stage(self._read())
        self.acc |= visit.acc
        self.fields |= visit.fields
        return visit

    def expose(self, keys: Sequence[str]) -> list[Memory] | None:
        """Where the tensor lies, and new tensors, to be filled and handed to `adopt`."""
        if not are_plain((self.g, self.p, *self.acc.values()), len(self.batch)):
            return None
        g, p, acc = self.g, self.p, self.acc
        new = {key: torch.empty_like(acc[key]) for key in keys if key in acc}
        return [Memory(g, p, acc, torch.empty_like(p, memory_format=torch.contiguous_format), new)]

    def adopt(self, memories: Sequence[Memory]) -> None:
        """Take the new tensors of `expose`, the only entry."""
        (memory,) = memories
        self.p, self.acc = memory.new_p, {**self.acc, **memory.new_acc}

    def list_rows(self, key: str) -> list[Tensor]:
        """The tensor's own numbers under `key`, `[*batch, features]`."""
        return [self.acc[key]]

    def keep_rows(self, rows: Mapping[str, Sequence[Tensor]]) -> None:
        """Take new numbers, one tensor for each name."""
        self.acc |= {key: row for key, (row,) in rows.items()}

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """The sums of a stage that is called once, on the whole tensor; what it makes is kept for the later stages."""
        return self._call(stage).sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Take new accumulators and fields in place of those of their names; the tensors stay as autograd saw them."""
        self.acc |= acc
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Mapping[str, Tensor]:
        """Put a new tensor in the place of `p`, so that meta-gradients flow from it through the step to the rule."""
        delta = self._call(stage).delta
        assert delta is not None, "`move` makes the step"
        finished = Finished(delta) if finish is None else finish(delta, self._read)
        self.acc |= finished.acc
        self.p = self.p + finished.multiply()
        return finished.numbers
