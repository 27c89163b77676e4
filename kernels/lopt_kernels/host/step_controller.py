"""The numbers that rule `base` decides for each tensor, by `step_controller.cpp`: float32 on the CPU, no derivatives.

The definitions are `lopt.rules.lopt_base` and `lopt.rules.building_blocks.step_controller`; what changes in their
formulas has to change in the file, too, which `tests/rules/test_base_on_host.py` tells. Constants are handed over.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt_kernels.host.compiled import load_library

WEIGHT_NDIMS = (0, 0, 0, 0, 0, 2, 2, 2)
"""Dimensions of log_size, log_vector, log_relative, depth, log_decay, direct, readout and hidden, without a batch's."""


class Constants(NamedTuple):
    """Those of rule and controller, which have their reasons, in the order of the file's.

    Attributes:
        matrices: their number.
    """

    tiny: float
    smallest_scale: float
    scale_of_zero: float
    least_active: float
    lowest: float
    highest: float
    gain_range: float
    rate: float
    share: float
    average: float
    smallest_share: float
    matrices: float
    every: float
    eager: float
    step_scale: float
    rate_scale: float


class HostRun(NamedTuple):
    """Where B runs are: `[B, k]` each, k being 1 or n.

    Attributes:
        step, now: updates of the tensor and of the run, int64.
        planned: of the run.
        schedule: factor on sizes.
    """

    step: Tensor
    now: Tensor
    planned: Tensor
    schedule: Tensor


def decide(
    constants: Constants, weights: Sequence[Tensor], rows: Sequence[Tensor], run: HostRun, means: Tensor, shapes: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Rows of all tensors after the decision, and the sizes of steps, decays and which bases are due, `[B, n]`.

    Args:
        weights: in the order of `WEIGHT_NDIMS`, of the rule or `[B, ...]`.
        rows: scale, gain, agreement and measured, `[B, n, ...]`; all but measured are new in what comes back.
        means: of the squares of p and of where g is 0, `[2, B, n]`.
        shapes: `[n, 4]`, see `describe_shapes`.
    """
    library = _load()
    assert library is not None, "callers ask `is_available` first"
    batch, n = means.shape[1:]
    weights = [w.detach().contiguous() for w in weights]
    rows, step, now, planned, schedule = _make_contiguous(rows), *_make_contiguous(run)
    fresh = [x if i == 3 else torch.empty_like(x) for i, x in enumerate(rows)]
    size, decay = torch.empty(2, batch, n, dtype=torch.float32, device="cpu")
    due = torch.empty(batch, n, dtype=torch.bool, device="cpu")
    strides = [w.stride(0) if w.ndim > ndim else 0 for w, ndim in zip(weights, WEIGHT_NDIMS, strict=True)]
    tables = [
        [number for w, stride in zip(weights, strides, strict=True) for number in (w.data_ptr(), stride)],
        [x.data_ptr() for x in rows],
        [x.data_ptr() for x in fresh],
        [*(x.data_ptr() for x in (step, now, planned, schedule)), step.shape[1]],
    ]
    arrays: list[array[Any]] = [*(array("q", table) for table in tables), array("f", constants)]
    library.lopt_decide(
        *(n, batch),
        *(table.buffer_info()[0] for table in arrays),
        *(x.data_ptr() for x in (means, shapes, size, decay, due)),
    )
    return fresh, size, decay, due


def review(constants: Constants, step: Tensor, products: Tensor, kept: float, momentum: float, second: float) -> Tensor:
    """What the controller hears of a step, `[B, n, 2]`: `measure_step`.

    Args:
        step: updates before it, int64 `[B, 1 or n]`.
        products: `[B, n, 5]`, contiguous.
        kept: share that the old momentum has in the step.
        momentum, second: shares that are kept of the averages.
    """
    library = _load()
    assert library is not None, "callers ask `is_available` first"
    batch, n = products.shape[:2]
    step, measured = step.contiguous(), products.new_empty(batch, n, 2)
    told = array("f", constants)
    numbers = (step.data_ptr(), step.shape[1], products.data_ptr(), told.buffer_info()[0])
    library.lopt_review(n, batch, *numbers, kept, momentum, second, measured.data_ptr())
    return measured


def is_available() -> bool:
    """Whether it can be used here, or compiled now."""
    return _load() is not None


def _make_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


@cache
def _load() -> ctypes.CDLL | None:
    library = load_library("step_controller")
    if library is not None:
        functions: list[tuple[Any, list[Any]]] = [
            (library.lopt_decide, [c_int64, c_int64, *[c_void_p] * 10]),
            (library.lopt_review, [c_int64, c_int64, c_void_p, c_int64, *[c_void_p] * 2, *[c_float] * 3, c_void_p]),
        ]
        for function, arguments in functions:
            function.argtypes, function.restype = arguments, None
    return library
