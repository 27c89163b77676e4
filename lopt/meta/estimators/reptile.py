"""Reptile: a start moves towards where tasks end that began there; no derivative of anything but the tasks' losses.

Source: Nichol, Achiam & Schulman 2018, arXiv 1803.02999. Differs from the source: the outer optimizer is the trainer's
AdamW, whose steps do not depend on the size of the moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.bookkeeping import Tally, find_finite
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.rules.learned_init import INIT


@dataclass(eq=False, kw_only=True)
class Reptile(Estimator):
    """Every estimate runs new tasks for `num_steps` steps: the gradient of the start is (start - end), averaged.

    It is for a rule with an initialisation (`LearnedInit`) of which nothing else is learned. What the objective says is
    logged, and nothing else.

    Raises:
        ValueError: a teacher; and when tasks are started, a rule without an initialisation, or with more to learn.
    """

    name = "reptile"
    needs_init: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None:
            raise ValueError("reptile follows the tasks and imitates nobody: leave the teacher out")

    @property
    def draws_horizons(self) -> bool:
        return False

    def configure(self, loop: InnerLoop) -> InnerLoop:
        """The loop with the common settings, and with tasks that all run for `num_steps` steps."""
        rule = loop.rule
        if rule.initial_params is None:
            raise ValueError(f"reptile learns where tasks start, and {rule.name!r} does not say: add a section [init]")
        others = [name for name in rule.meta_weights() if not name.startswith(f"{INIT}.")]
        if others:
            raise ValueError(
                f"reptile learns {INIT}.* alone, and the rule has {others[0]!r} to learn: "
                f'set trainer.train_only = ["{INIT}.*"]'
            )
        return replace(super().configure(loop), horizon=partial(torch.full_like, fill_value=self.num_steps))

    def start(self, loop: InnerLoop, ids: Tensor) -> Slots:
        return self.configure(loop).start(ids)

    @torch.no_grad()
    def estimate(self, loop: InnerLoop, carry: Slots) -> Estimate:
        loop, tally, spec = self.configure(loop), Tally(), loop.family.spec
        window = loop.unroll(carry, self.num_steps, restart=False)
        healthy = find_finite(window)
        tally.add(window, self.weigh(window, loop.family)[:, healthy], healthy)
        # A task that is not finite is left out of the mean, which is 0 where none is.
        start = spec.flatten(loop.rule.initial_params or {})
        moves = spec.unflatten((start - window.slots.params[healthy]).sum(0) / max(tally.alive, 1))
        gradient = {name: moves[name.removeprefix(f"{INIT}.")] for name in loop.rule.meta_weights()}
        fresh = loop.restart(carry.ids, carry.episode + 1)
        return Estimate(gradient, tally.alive, fresh, tally.summarize(len(healthy)))
