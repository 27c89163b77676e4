"""AdamW as it steps groups with `rule="adamw"`: betas and eps are options of the groups, read at every step.

So groups with other numbers are stepped together, and a schedule on the betas makes no new rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.optim.units import Unit
from lopt.rules.adam import AdamW, direct_adam
from lopt.rules.stages import Accumulators, Steppable

NUMBERS = ("beta1", "beta2", "eps")


class GroupAdamW(AdamW):
    """AdamW whose betas and eps are found among the fields of a step, under the names of `NUMBERS`.

    Learning rate and decay, too, are the group's, but these are the optimizer's for any rule (`ParameterUpdate`).
    """

    def __init__(self) -> None:
        super().__init__(lr=1.0, weight_decay=0.0)

    def direction(self, g: Tensor, acc: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        beta1, beta2, eps = (acc[name] for name in NUMBERS)
        return direct_adam(g, acc, step, beta1, beta2, eps)


def give_numbers(unit: Unit, tensor: Steppable) -> None:
    """Give the groups' betas and eps to a unit's tensors, for one step of `GroupAdamW`.

    Args:
        tensor: of the unit.
    """
    # With dimensions of 1 they meet elements; a number that all members share is one for all.
    fields = {}
    for name, x in zip(NUMBERS, unit.read_adamw(), strict=True):
        shape = [-1] * tensor.stacked + [1] * tensor.layout.ndim
        given = torch.as_tensor(x, dtype=torch.float32, device=unit.members[0].p.device)
        fields[name] = given.reshape(shape)
    tensor.keep({}, fields)
