"""The step of rule `base` by `rotated_adam.cpp`: for float32 on the CPU, without derivatives.

The definition is the rule's, `lopt.rules.lopt_base`, whose stages `measure`, `move` and `finish` these calls replace;
`tests/rules/test_base_on_host.py` compares the two.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.host.compiled import load_library

PRODUCTS = 5


class Item(NamedTuple):
    """A parameter `[rows, columns]`, float32, there once or once per batch; what is new may be the old memory.

    Attributes:
        is_matrix: it decays.
        is_compact: factors and bases are bfloat16.
        blocks: how many rows, and how many columns, have a basis together.
        tensors: g, p, m, v, left factor and basis, right factor and basis, and new ones of all but g. None: there is
            no such factor; of new bases, they are not written, as nothing is due.
        lr, weight_decay: `p <- p + lr * step - lr * weight_decay * p`.
    """

    rows: int
    columns: int
    is_matrix: bool
    is_compact: bool
    blocks: tuple[int, int]
    tensors: Sequence[Tensor | None]
    lr: float
    weight_decay: float


class Constants(NamedTuple):
    """Those of the rule, which has their reasons: shares that are kept of averages, small numbers to add, and the share
    of a side's lines that must have a gradient for a new basis.
    """

    momentum: float
    second: float
    factors: float
    ridge: float
    tiny: float
    smallest_norm: float
    least_lines: float


class HostStep:
    """One step of n parameters in all batches, in two calls.

    Args:
        constants: of the rule.
        items: n of them.
        batch: how many there are of each, in the first dimension of its tensors; None: one, without that dimension.
    """

    def __init__(self, constants: Constants, items: Sequence[Item], batch: int | None) -> None:
        library = _load()
        assert library is not None, "callers ask `is_available` first"
        self.library, self.items, self.constants = library, items, array("f", constants)
        self.shape = (1 if batch is None else batch, len(items))
        numbers: list[int] = []
        for rows, columns, is_matrix, is_compact, blocks, tensors, *_ in items:
            numbers += (rows, columns, is_matrix, *blocks, is_compact)
            for x in tensors:
                numbers += (0, 0) if x is None else (x.data_ptr(), 0 if batch is None else x.stride(0))
        self.table = array("q", numbers)
        self.told = (self.table.buffer_info()[0], self.shape[1], self.shape[0])

    def measure(self) -> Tensor:
        """Means of p^2 and of where g is 0, `[2, batch, n]`."""
        means = torch.empty(2, *self.shape, dtype=torch.float32, device="cpu")
        self.library.lopt_measure(*self.told, means.data_ptr())
        return means

    def step(self, size: Tensor, decay: Tensor, due: Tensor) -> Tensor:
        """Make the step: everything new is written.

        Args:
            size, decay: `[batch, n]`, of `lopt.rules.lopt_base.BaseDecision`.
            due: bool, likewise.
        Returns:
            What `lopt.rules.building_blocks.step_controller.multiply_step` makes, `[batch, n, 5]`.
        """
        size, decay, due = (x.expand(self.shape).contiguous() for x in (size.float(), decay.float(), due))
        products = torch.empty(*self.shape, PRODUCTS, dtype=torch.float32, device="cpu")
        rates = array("f", [rate for item in self.items for rate in (item.lr, item.weight_decay)])
        need = self.library.lopt_work(*self.told)
        work = torch.empty(need, dtype=torch.float32, device="cpu")
        numbers = (size.data_ptr(), decay.data_ptr(), due.data_ptr(), rates.buffer_info()[0])
        constants = self.constants.buffer_info()[0]
        self.library.lopt_step(*self.told, *numbers, constants, products.data_ptr(), work.data_ptr())
        return products


def is_available() -> bool:
    """Whether it can be used here, or compiled now."""
    return _load() is not None


@cache
def _load() -> ctypes.CDLL | None:
    library = load_library("rotated_adam")
    if library is not None:
        pairs: list[tuple[Any, int]] = [(library.lopt_work, 0), (library.lopt_measure, 1), (library.lopt_step, 7)]
        for function, pointers in pairs:
            function.argtypes, function.restype = (c_void_p, c_int64, c_int64, *[c_void_p] * pointers), None
        library.lopt_work.restype = c_int64
    return library
