"""A parameter that is stepped at once, as autograd has to see it: how `Rule.update` walks through a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lopt.rules.layout import find_layout
from lopt.rules.stages import NOTHING, Accumulators, Elements, Finish, Sum, Visit


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

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """The sums of a stage that is called once, on the whole tensor; what it makes is kept for the later stages."""
        return self._call(stage).sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Take new accumulators and fields in place of those of their names; the tensors stay as autograd saw them."""
        self.acc |= acc
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """Put a new tensor in the place of `p`, so that meta-gradients flow from it through the step to the rule."""
        self.p = self.p + self.make_delta(stage, finish)

    def make_delta(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Tensor:
        """The step `[*batch, *shape]` that `move` would add to the parameter, for those who add it in another way."""
        delta = self._call(stage).delta
        assert delta is not None, "`move` makes the step"
        if finish is not None:
            finished = finish(delta, self._read)
            self.acc |= finished.acc
            delta = finished.multiply()
        return delta
