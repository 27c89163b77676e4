"""Evolution strategies on whole runs: unbiased up to the smoothing, with the objective of one's choice.

Source: Rechenberg 1973, Salimans et al. 2017, arXiv 1703.03864; on learned optimizers Metz et al. 2019, 1810.10180.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lopt.meta.estimators.base import Estimate
from lopt.meta.estimators.evolution import Evolution, Pairs, draw_perturbation
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots, Window
from lopt.rules import Rule


class FullES(Evolution):
    """Every estimate runs new tasks from their start to their end.

    Args:
        num_steps: length of the runs; 0 (default) takes each task's horizon.
        objective: also "min", the lowest loss of the run.
        sigma, objective_split, normalize, loss_clamp, task_chunk, compile, teacher, imitation, follow: see `Evolution`.
    """

    name = "full_es"
    staggered = False
    kept = 1
    objectives = (*Evolution.objectives, "min")

    def __init__(
        self,
        num_steps: int = 0,
        sigma: float = 0.01,
        objective: str = "mean",
        objective_split: str = "train",
        normalize: bool = False,
        loss_clamp: float = 10.0,
        task_chunk: int | None = None,
        compile: bool = False,
        teacher: Rule | None = None,
        imitation: float = 0.0,
        follow: float = 0.0,
    ) -> None:
        options: dict[str, Any] = {"teacher": teacher, "imitation": imitation, "follow": follow}
        super().__init__(
            num_steps or 1, sigma, objective, objective_split, normalize, loss_clamp, task_chunk, compile, **options
        )
        self.num_steps = num_steps

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """As `Evolution.configure`; with `num_steps` every task runs that long."""
        loop = super().configure(loop)
        if not self.num_steps:
            return loop
        return replace(loop, horizon=lambda seeds: torch.full_like(seeds, self.num_steps))

    def perturb(self, loop: InnerLoop, start: Slots, episode: Tensor) -> Tensor:
        """See `Evolution.perturb`: that of the run."""
        return draw_perturbation(loop, start.ids, episode)

    def unroll(self, loop: InnerLoop, slots: Slots) -> Window:
        """Each pair to its own end."""
        return loop.run_to_end(slots)

    def estimate(self, loop: InnerLoop, carry: Pairs) -> Estimate:
        """See `Estimator.estimate`."""
        estimate = super().estimate(loop, carry)
        slots = self.configure(loop).restart(carry.slots.ids, carry.slots.episode + 1)
        return estimate._replace(carry=carry._replace(slots=slots))
