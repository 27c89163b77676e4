"""What is recorded of a step where a metric without a derivative is minimised in place of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vmap

from lopt.meta.unroll.draws import Batches

if TYPE_CHECKING:
    from lopt.meta.unroll.inner_loop import InnerLoop


@torch.no_grad()
def measure_errors(loop: InnerLoop, flat: Tensor, batches: Batches) -> Tensor:
    """1 - `loop.meta_metric` of base learners, `[T]`.

    Args:
        flat: parameters `[T, P]`.
        batches: of a step, that of `loop.meta_split` among them.
    Raises:
        ValueError: the family does not measure it.
    """
    family, metric = loop.family, loop.meta_metric
    found = vmap(family.metrics)(family.spec.unflatten(flat), batches[loop.meta_split])
    if metric not in found:
        known = f"measures {', '.join(found)}" if found else "measures nothing beside its loss"
        raise ValueError(
            f"objective_metric {metric!r} is not a metric of {family.describe()}, which {known}: leave it out or train "
            "on a family of classifiers"
        )
    errors: Tensor = 1 - found[metric]
    return errors
