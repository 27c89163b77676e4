"""The program of the rules whose step of an element depends on that element alone: one launch of one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lopt_kernels import OPS
from lopt_kernels.launching.op import Op
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import Segment, Segments, by_elements
from torch import Tensor

from lopt.rules import Clock, Rule
from lopt.rules.programs.base import Program
from lopt.rules.programs.views import ParameterView

# rule -> its op, whose formula names the rules that it steps
ELEMENTWISE_OPS: dict[str, Op] = {name: op for op in OPS.values() if op.formula for name in op.formula.rules}


class ElementwiseProgram(Program):
    """Steps a rule by the op whose formula names it: nothing is to be written here for another such rule.

    The op's formula says which attributes of the rule are its meta-weights and numbers, and which accumulators its
    state. Products of matrices are as precise as `torch.set_float32_matmul_precision` says when the program is made.
    """

    def __init__(
        self, rule: Rule, groups: Sequence[Sequence[ParameterView]], count: int, slots: int | None = None
    ) -> None:
        super().__init__(rule, groups, count, slots)
        self.op = ELEMENTWISE_OPS[rule.name]
        block = by_elements(self.op.block)
        self.tables = [Segments([self._make_segment(view) for view in views], block) for views in groups]
        self.stacks = self.op.formula.weights(*self._read_stacks())
        self.numbers = {name: getattr(rule, name) for name in self.op.formula.numbers}
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    @classmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        formula = ELEMENTWISE_OPS[rule.name].formula
        hidden = getattr(rule, "hidden", 0)
        if rule.needs_num_steps:
            return f"the fused {rule.name} has no schedule"
        if formula.layers is not None and hidden > formula.layers.max_hidden:
            return f"the fused {rule.name} is at most {formula.layers.max_hidden} wide, not {hidden}"
        return None

    def _make_segment(self, view: ParameterView) -> Segment:
        state = (view.state[key] for key in self.op.formula.keys)
        return Segment((view.p, *state), (view.p.numel(),), view.number, view.slot)

    def _read_stacks(self) -> list[Tensor]:
        weights = [getattr(self.rule, name).detach() for name in self.op.formula.weights._fields]
        # Kernels always read stacks: a rule's own weights are a stack of one.
        return [(x[None] if self.slots is None else x).contiguous() for x in weights]

    def load(self) -> None:
        for old, new in zip(self.stacks, self._read_stacks(), strict=True):
            # Into the memory that launches and captured graphs address.
            old.copy_(new)

    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        launch = self.op.launch_segments
        assert launch is not None, "the op steps parameters"
        for table, group_items in zip(self.tables, items, strict=True):
            launch(table, self.stacks, group_items, sanitize=sanitize, precision=self.precision, **self.numbers)
