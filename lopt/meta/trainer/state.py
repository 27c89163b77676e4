"""All that a run goes on from: what its checkpoint holds, and there is no other state.

Random draws are named, so what a run will do follows from its configuration and from this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lopt.meta.trainer.best import Best
from lopt.meta.trainer.checkpoint import select
from lopt.meta.trainer.merging import Merger
from lopt.meta.trainer.meta_weights import copy_weights
from lopt.meta.trainer.outer_optimizer import OuterOptimizer
from lopt.meta.trainer.source import Source
from lopt.meta.trainer.stop import DeadSteps
from lopt.rules import Rule


@dataclass(eq=False)
class RunState:
    """Where a run stands between two outer steps; every rank has all of it but the carries, which are of its own slots.

    Attributes:
        rule: that is trained, with its present weights.
        sources: with the carries of their slots and the stages of their horizons.
        outer, merger: the outer optimizer with its moments and averages, and the running sizes of meta-gradients.
        best: the best weights so far.
        dead: outer steps in a row that taught nothing.
        step: outer steps made.
        seconds: of wall-clock time that they took.
    """

    rule: Rule
    sources: Sequence[Source]
    outer: OuterOptimizer
    merger: Merger
    best: Best
    dead: DeadSteps = field(default_factory=DeadSteps)
    step: int = 0
    seconds: float = 0.0

    @property
    def begun(self) -> bool:
        """Whether the first point of every curve is there, the validation before any step.

        A run that goes on from the checkpoint after it does not validate once more, which would count as one in vain.
        """
        return self.step > 0 or self.best.validated >= 0

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of a checkpoint; on other ranks than 0 without the carries.

        Carries are on all ranks, which have to call this together.
        """
        best, metadata = self.best.gather_state()
        tensors = {f"weights.{name}": value for name, value in copy_weights(self.rule).items()} | best
        tensors |= self.outer.gather_state() | self.merger.gather_state()
        for i, source in enumerate(self.sources):
            tensors |= {f"carry.{i}.{key}": value for key, value in source.gather_carry().items()}
        # All schedules hear of the same validations: one number is that of each.
        improved = max((source.horizon.improved for source in self.sources if source.horizon), default=0)
        metadata |= {"step": self.step, "seconds": self.seconds}
        return tensors, metadata | {"dead_steps": self.dead.in_a_row, "horizon_improved": improved}

    def list_tensors(self) -> set[str]:
        """The names of what a checkpoint holds, but for the outer optimizer's moments: known before one is read."""
        names = {f"weights.{name}" for name in self.rule.state_dict()} | set(self.best.gather_state()[0])
        names |= {f"carry.{i}.{name}" for i, source in enumerate(self.sources) for name in source.list_carry()}
        return names | set(self.outer.list_average()) | set(self.merger.gather_state())

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Take back what `gather` returned, of the same configuration; each rank takes its share of the carries."""
        self.rule.load_state_dict(select(tensors, "weights."))
        self.best.restore_state(tensors, metadata)
        self.outer.restore_state(tensors)
        self.merger.restore_state(tensors)
        for i, source in enumerate(self.sources):
            source.restore_carry(select(tensors, f"carry.{i}."))
            if source.horizon:
                source.horizon.improved = metadata["horizon_improved"]
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.dead.in_a_row = metadata["dead_steps"]
