"""Rule `base` by compiled code: from a step's tensors to the tables of `lopt_kernels.host`, and back.

The rule's stages say what the code computes. Every constant is handed over, so that it has one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from lopt_kernels.host import rotated_adam, step_controller
from lopt_kernels.host.rotated_adam import Constants, HostStep, Item
from lopt_kernels.host.step_controller import HostRun
from torch import Tensor

from lopt.core.tensors import is_traced
from lopt.rules.building_blocks import step_controller as controller
from lopt.rules.building_blocks.eigenbases import find_block
from lopt.rules.building_blocks.open_schedule import find_schedule
from lopt.rules.building_blocks.step_controller import describe_shapes, plan_steps
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Memory, Steppable

KEYS = ("m", "v", "left_factor", "left_basis", "right_factor", "right_basis")
BASES = ("left_basis", "right_basis")
LINES = ("left_factor", "right_factor", *BASES)
ROWS = ("scale", "gain", "agreement", "measured")
Deciding = tuple[float, float, float, int, int]
"""The rule's SMALLEST_SCALE, SCALE_OF_ZERO and LEAST_ACTIVE, every how many steps bases are renewed, and EAGER."""


def is_ready(device: torch.device) -> bool:
    """Whether compiled code may make a step on a device now: there is some, and nobody records or transforms it."""
    if device.type != "cpu" or torch.is_grad_enabled() or is_traced() or torch._C._are_functorch_transforms_active():
        return False
    return rotated_adam.is_available() and step_controller.is_available()


class TensorStep:
    """One step of all tensors, in three calls: `decide`, `step`, `review`.

    Args:
        constants, deciding, max_side: of the rule.
        tensors, memories: what each of the tensors has exposed.
    """

    def __init__(
        self,
        constants: Constants,
        deciding: Deciding,
        max_side: int,
        tensors: Sequence[Steppable],
        memories: Sequence[Sequence[Memory]],
    ) -> None:
        self.constants, self.tensors, self.memories = constants, tensors, memories
        first = tensors[0]
        self.batch = first.batch[: len(first.batch) - first.stacked]
        pairs = [(tensor.layout, memory) for tensor, part in zip(tensors, memories, strict=True) for memory in part]
        items = [_describe(layout, memory, max_side) for layout, memory in pairs]
        self.host = HostStep(constants, items, self.batch[0] if self.batch else None)
        layouts = tuple(tensor.layout for tensor in tensors)
        self.shapes, self.told = _describe_all(layouts, tuple(tensor.count for tensor in tensors), deciding)

    def decide(self, weights: Sequence[Tensor], tensors: AllTensors) -> tuple[Accumulators, list[Tensor]]:
        """`Base.measure` and `Base.decide_together`: new rows `[*batch, n, ...]`, and size, decay and due `[B, n]`.

        Args:
            weights: the rule's, in the order of `step_controller.WEIGHT_NDIMS`.
            tensors: without means.
        """
        clock = tensors.clock
        known = (clock.step, clock.count_steps(), plan_steps(clock, torch.float32), find_schedule(clock, torch.float32))
        present = clock.step.shape
        step, now, planned, schedule = (self._lift(x if x.shape == present else x.expand(present)) for x in known)
        self.run = HostRun(step, now, planned, schedule)
        rows = [self._lift(tensors.tensor_state[key]) for key in ROWS]
        fresh, *decided = step_controller.decide(self.told, weights, rows, self.run, self.host.measure(), self.shapes)
        shape = (*self.batch, len(self.host.items))
        return {k: x.view(*shape, x.shape[-1]) for k, x in zip(ROWS, fresh, strict=True) if k != "measured"}, decided

    def step(self, size: Tensor, decay: Tensor, due: Tensor) -> Accumulators:
        """Make the step that was decided: `Base.move`, `Base.finish` and `Base.review`."""
        products = self.host.step(size, decay, due)
        for tensor, memory in zip(self.tensors, self.memories, strict=True):
            tensor.adopt(memory)
        shares = (self.constants.momentum**2, self.constants.momentum, self.constants.second)
        measured = step_controller.review(self.told, self.run.step, products, *shares)
        return {"measured": measured.view(*self.batch, *measured.shape[1:])}

    def _lift(self, x: Tensor) -> Tensor:
        """`[*batch, ...]` as `[B, ...]`."""
        return x if self.batch else x[None]


def start_step(
    constants: Constants, deciding: Deciding, max_side: int, tensors: Sequence[Steppable], renewed: bool
) -> TensorStep | None:
    """A step of tensors where they lie, or None where not all of them can be worked on there.

    Args:
        constants, deciding, max_side: of the rule.
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
    return TensorStep(constants, deciding, max_side, tensors, memories)


def _describe(layout: Layout, memory: Memory, max_side: int) -> Item:
    g, p, acc, new_p, new_acc, lr, weight_decay = memory
    matrix = layout.is_matrix
    rows, columns = (layout.shape[0], prod(layout.shape[1:])) if matrix else (1, prod(layout.shape))
    tensors = [g, p, *map(acc.get, KEYS), new_p, *(new_acc.get(key) for key in KEYS)]
    blocks = (find_block(rows, max_side), find_block(columns, max_side))
    compact = any(acc[key].dtype is torch.bfloat16 for key in LINES if key in acc)
    return Item(rows, columns, matrix, compact, blocks, tensors, lr, weight_decay)


@lru_cache(maxsize=64)
def _describe_all(
    layouts: tuple[Layout, ...], counts: tuple[int, ...], deciding: Deciding
) -> tuple[Tensor, step_controller.Constants]:
    """What of all tensors does not change from step to step."""
    shapes = describe_shapes(layouts, counts, torch.empty(0, dtype=torch.float32, device="cpu"))
    matrices = sum(count for layout, count in zip(layouts, counts, strict=True) if layout.is_matrix)
    smallest_scale, scale_of_zero, least_active, every, eager = deciding
    return shapes, step_controller.Constants(
        tiny=controller.TINY,
        smallest_scale=smallest_scale,
        scale_of_zero=scale_of_zero,
        least_active=least_active,
        lowest=controller.STEP_RANGE[0],
        highest=controller.STEP_RANGE[1],
        gain_range=controller.GAIN_RANGE,
        rate=controller.RATE,
        share=controller.SHARE,
        average=controller.AVERAGE,
        smallest_share=controller.SMALLEST_SHARE,
        matrices=float(matrices),
        every=every,
        eager=eager,
        step_scale=controller.OUTPUT_SCALES[0],
        rate_scale=controller.OUTPUT_SCALES[1],
    )
