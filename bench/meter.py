"""Where the time of meta-training goes: data, base learner, rule, and the estimator around them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.meta.unroll.draws import Batches
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.rules import State
from lopt.tasks import Batch

PARTS = ("data", "base learner", "rule")

T = TypeVar("T")


@dataclass
class Meter:
    """Seconds spent in each of `PARTS`."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def time(self, part: str, function: Callable[[], T]) -> T:
        """Call and time it; on a GPU, which is waited for."""
        _wait()
        begin = time.perf_counter()
        result = function()
        _wait()
        self.seconds[part] += time.perf_counter() - begin
        return result

    def shares(self, total: float) -> dict[str, float]:
        """Shares of `total` seconds, the estimator's among them: all that is in no other part."""
        measured = {part: seconds / total for part, seconds in self.seconds.items()}
        return measured | {"estimator": max(0.0, 1 - sum(measured.values()))}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class MeteredLoop(InnerLoop):
    """An inner loop that fills a meter; copies made with `dataclasses.replace` share it. Restarts are not metered."""

    meter: Meter = field(default_factory=Meter)

    def batches(self, slots: Slots, count: int, *, ends: bool = False) -> list[Batches]:
        return self.meter.time("data", lambda: super(MeteredLoop, self).batches(slots, count, ends=ends))

    def evaluate(self, params: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.meter.time("base learner", lambda: super(MeteredLoop, self).evaluate(params, batch))

    def update_slots(self, slots: Slots, weights: Params | None) -> tuple[Tensor, State]:
        return self.meter.time("rule", lambda: super(MeteredLoop, self).update_slots(slots, weights))
