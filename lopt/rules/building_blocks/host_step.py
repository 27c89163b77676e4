"""Rule `base` by compiled code: from a step's tensors to the table of `lopt_kernels.host.rotated_adam`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from lopt_kernels.host import rotated_adam
from lopt_kernels.host.rotated_adam import Constants, HostStep, Item
from torch import Tensor

from lopt.core.tensors import is_traced
from lopt.rules.layout import Layout
from lopt.rules.stages import Memory, Steppable

KEYS = ("m", "v", "left_factor", "left_basis", "right_factor", "right_basis")
BASES = ("left_basis", "right_basis")


def is_ready(device: torch.device) -> bool:
    """Whether compiled code may make a step on a device now: there is some, and nobody records or transforms it."""
    if device.type != "cpu" or torch.is_grad_enabled() or is_traced() or torch._C._are_functorch_transforms_active():
        return False
    return rotated_adam.is_available()


class TensorStep:
    """One step of all tensors; `measure` comes first, `step` ends it.

    Args:
        constants: of the rule.
        tensors, memories: what each of the tensors has exposed.
    """

    def __init__(
        self, constants: Constants, tensors: Sequence[Steppable], memories: Sequence[Sequence[Memory]]
    ) -> None:
        self.tensors, self.memories = tensors, memories
        first = tensors[0]
        self.batch = first.batch[: len(first.batch) - first.stacked]
        pairs = [(tensor.layout, memory) for tensor, part in zip(tensors, memories, strict=True) for memory in part]
        items = [_describe(layout, memory) for layout, memory in pairs]
        self.host = HostStep(constants, items, self.batch[0] if self.batch else None)

    def measure(self) -> tuple[Tensor, Tensor]:
        """The means of `Base.measure`, power and still, `[*batch, n]`."""
        power, still = (x.reshape(*self.batch, -1) for x in self.host.measure())
        return power, still

    def step(self, size: Tensor, decay: Tensor, due: Tensor) -> Tensor:
        """Make the step that was decided, each `[*batch, n]`; gives what `review` needs of it, `[*batch, n, 9]`."""
        products = self.host.step(size, decay, due)
        for tensor, memory in zip(self.tensors, self.memories, strict=True):
            tensor.adopt(memory)
        return products.reshape(*self.batch, *products.shape[-2:])


def start_step(constants: Constants, tensors: Sequence[Steppable], renewed: bool) -> TensorStep | None:
    """A step of tensors where they lie, or None where not all of them can be worked on there.

    Args:
        renewed: bases are written.
    """
    if len(tensors[0].batch) - tensors[0].stacked > 1:
        return None
    keys = KEYS if renewed else [key for key in KEYS if key not in BASES]
    memories = []
    for tensor in tensors:
        memory = tensor.expose(keys)
        if memory is None:
            return None
        memories.append(memory)
    return TensorStep(constants, tensors, memories)


def _describe(layout: Layout, memory: Memory) -> Item:
    g, p, acc, new_p, new_acc, lr, weight_decay = memory
    matrix = layout.is_matrix
    rows, columns = (layout.shape[0], prod(layout.shape[1:])) if matrix else (1, prod(layout.shape))
    tensors = [g, p, *map(acc.get, KEYS), new_p, *(new_acc.get(key) for key in KEYS)]
    return Item(rows, columns, matrix, tensors, lr, weight_decay)
