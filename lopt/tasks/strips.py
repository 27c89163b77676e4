"""A range cut into strips, of which each pool of tasks has its own: no test task can have been met."""

from __future__ import annotations

from torch import Tensor

from lopt.core.names import choose
from lopt.tasks.base import POOLS

STRIPS = 1000
"""Parts of a range; of ten in a row eight are for training, and one for each of the other pools."""

PLACES = {"train": range(8), "outer_valid": range(8, 9), "test": range(9, 10)}

STRIP_POOLS = {pool: [i for i in range(STRIPS) if i % 10 in places] for pool, places in PLACES.items()}


def draw_strips(drawn: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Where in a range tasks of a pool are.

    Args:
        drawn: float64 `[T, 2]`, uniform in [0, 1).
        pool: one of `POOLS`.
    Returns:
        Strips, int64 `[T]`, and places in [0, `STRIPS`), float64 `[T]`, whose whole part is the strip.
    """
    places = PLACES[choose("pool", pool, POOLS)]
    row = (drawn[:, 0] * (STRIPS // 10)).long()
    strip = 10 * row + places.start + (drawn[:, 1] * len(places)).long()
    # Where in its strip a place is takes what is left of the number that the strip was drawn by.
    return strip, strip + (drawn[:, 1] * len(places)) % 1
