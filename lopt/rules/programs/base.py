"""What a program is: the launches that make one step of a rule for many parameters.

A program is to the kernels what the stages of a rule are to PyTorch: it computes the same step, and the rule remains
its definition, against which tests compare it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from lopt_kernels.launching.parameters import Items
from torch import Tensor

from lopt.rules import Clock, Rule
from lopt.rules.layout import Layout
from lopt.rules.programs.views import Order, ParameterView


class Program(ABC):
    """Tables for parameters that stay where they are; `run` steps them all. Parts are not kept: they hold state.

    Args:
        rule: frozen, on the parameters' device.
        groups: views of equal dtypes of parameter and gradient.
        count: how many parameters there are in all.
        slots: the rule's meta-weights are stacks of so many, `[slots, ...]` each (`lopt.rules.programs.population`), of
            which a view's `slot` is its row, and items are numbered slot by slot. None: they are its own.
    """

    def __init__(
        self, rule: Rule, groups: Sequence[Sequence[ParameterView]], count: int, slots: int | None = None
    ) -> None:
        self.rule, self.count, self.slots = rule, count, slots

    @classmethod
    @abstractmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        """Why the kernels do not take a rule as it is configured on a device, or None if they do."""

    @classmethod
    def suits(cls, rule: Rule, layout: Layout, order: Order) -> bool:
        """Whether the kernels take a parameter in this order of its axes; if not, the step copies it."""
        return True

    def divide_slots(self, x: Tensor) -> Tensor:
        """All parameters' `[count, ...]` as `[(slots,) n, ...]`."""
        return x if self.slots is None else x.view(self.slots, -1, *x.shape[1:])

    @abstractmethod
    def load(self) -> None:
        """Read the rule's meta-weights anew, to where the launches have them: addresses stay, as graphs need."""

    @abstractmethod
    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        """One step of all parameters, in place.

        Args:
            items: for each batch; their tensors are numbers of all parameters.
            sanitize: entries of gradients that are not finite count as 0.
            loss: `[1 or count]`, or `[slots, 1]`, or None.
            clock: int64 `[count]`.
        """
