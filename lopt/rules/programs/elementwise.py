"""Programs of the rules whose step of an element depends on that element alone: one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lopt_kernels import OPS
from lopt_kernels.elementwise import lstm
from lopt_kernels.elementwise.adamw import AdamWWeights
from lopt_kernels.elementwise.lstm import LSTMWeights
from lopt_kernels.elementwise.rnnprop import RNNpropWeights
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import Segment, Segments, by_elements
from torch import Tensor

from lopt.rules import Clock, Rule
from lopt.rules.lstm import STATE
from lopt.rules.programs.base import Program
from lopt.rules.programs.parts import Part


class ElementwiseProgram(Program):
    """An op with `launch_segments`.

    Attributes:
        op: its name in `OPS`.
        keys: the accumulators, in the op's order.
        weights: of the op; its fields are meta-weights of the rule.
        numbers: attributes of the rule that the launch takes.
    """

    op: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    weights: ClassVar[Any]
    numbers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int, slots: int | None = None) -> None:
        super().__init__(rule, batches, count, slots)
        block = by_elements(OPS[self.op].block)

        def make_segment(t: Part) -> Segment:
            return Segment((t.p, *(t.state[k] for k in self.keys)), (t.p.numel(),), t.item, t.slot)

        self.tables = [Segments([make_segment(t) for t in parts], block) for parts in batches]
        self.stacks = self.weights(*self._read_stacks())
        self.options = {name: getattr(rule, name) for name in self.numbers}

    def _read_stacks(self) -> list[Tensor]:
        own = [getattr(self.rule, name).detach() for name in self.weights._fields]
        return [(x[None] if self.slots is None else x).contiguous() for x in own]

    def load(self) -> None:
        """See `Program.load`."""
        for old, new in zip(self.stacks, self._read_stacks(), strict=True):
            old.copy_(new)

    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        """See `Program.run`."""
        launch = OPS[self.op].launch_segments
        assert launch is not None, "the op steps parameters"
        for table, own in zip(self.tables, items, strict=True):
            launch(table, self.stacks, own, sanitize=sanitize, **self.options)


class AdamWProgram(ElementwiseProgram):
    """AdamW, without a schedule of its own."""

    op = "adamw"
    keys = ("m", "v")
    weights = AdamWWeights

    @classmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        """See `Program.find_obstacle`."""
        return None if not rule.needs_num_steps else "the fused AdamW has no schedule"


class LSTMProgram(ElementwiseProgram):
    """The coordinatewise LSTM. Its matrix products are as precise as `torch.set_float32_matmul_precision` says."""

    op = "coordinatewise_lstm"
    keys: ClassVar[tuple[str, ...]] = STATE
    weights: ClassVar[Any] = LSTMWeights
    numbers: ClassVar[tuple[str, ...]] = ("output_scale", "log_bound")

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int, slots: int | None = None) -> None:
        super().__init__(rule, batches, count, slots)
        exact = torch.get_float32_matmul_precision() == "highest"
        self.options |= {"precision": "ieee" if exact else "tf32"}

    @classmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        """See `Program.find_obstacle`."""
        hidden = rule.hidden
        assert isinstance(hidden, int)
        return None if hidden <= lstm.MAX_WIDTH else f"the fused LSTM is at most {lstm.MAX_WIDTH} wide, not {hidden}"


class RNNpropProgram(LSTMProgram):
    """The coordinatewise LSTM on Adam's directions."""

    op = "rnnprop"
    keys = (*STATE, "m", "v")
    weights = RNNpropWeights
    numbers = ("beta1", "beta2", "output_scale")
