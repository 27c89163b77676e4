"""A schedule for trainings whose length may not be known: a slow decay, and half a cosine to 0 once the end is.

A planned run has the cosine of Loshchilov and Hutter 2017, arXiv 1608.03983, from its first step on. An open one is
cooled down when its end becomes known, as the constant rates of Haegele et al. 2024, arXiv 2405.18392, are.
Differs from the source: the size is not constant before, but decays as a power of the steps, which needs no horizon.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from lopt.rules.stages import Clock

DECAY_STEPS = 100  # open steps after which the decay begins to show
DECAY_POWER = 0.25


def find_schedule(clock: Clock, dtype: torch.dtype) -> Tensor:
    """Factor on the size of steps, `[*batch]`: 1 at the first step, and 0 at a known end and beyond it.

    `(1 + t / DECAY_STEPS)^-DECAY_POWER` after t open steps, times `(1 + cos(pi x)) / 2`, x being the share of the way
    from there to the end. Planned runs, open ones and those that cool down may be in one batch.
    """
    size: Tensor = (1 + clock.count_open_steps().to(dtype) / DECAY_STEPS) ** -DECAY_POWER
    progress = clock.progress(dtype)
    return size if progress is None else size * ((1 + torch.cos(pi * progress.clamp(0, 1))) / 2)
