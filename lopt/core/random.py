"""Randomness that is a function of (seed, stream, counters): runs resume bitwise without any generator's state.

Nothing in lopt draws from torch's global generator. A draw is named by a seed, the name of its stream and
counters (slot, episode, step, ...), so a run needs no generator state to resume bitwise and a task draws the
same numbers whatever batch, process or order it runs in.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.core.tensors import is_traced

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15

Words = Any
"""int64 with wrap-around: a tensor, or numpy's array, whose small operations take a fifth of the time on a CPU, but of
which a compiler sees nothing."""


def _shift_right(x: Words, bits: int) -> Words:
    """Logical (zero-filling) right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Words) -> Words:
    """splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _to_words(x: Tensor) -> Words:
    """For arithmetic outside of graphs; an array has a dimension at least, as numpy's numbers do not wrap silently."""
    return np.atleast_1d(x.numpy()) if x.device.type == "cpu" and not is_traced() else x


def derive_seeds(seed: int, stream: str, *counters: Tensor | int) -> Tensor:
    """Independent 64-bit seeds, one per element of the broadcast `counters`.

    Args:
        seed: the run's seed.
        stream: what is drawn ("batch", "init", ...); streams never collide by accident.
        counters: integers or int64 tensors that broadcast together.
    Returns:
        int64 tensor of the counters' broadcast shape (0-dim when all are integers).
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return fold_in(torch.tensor(int.from_bytes(digest[:8], "little", signed=True)), *counters)


def fold_in(seeds: Tensor, *counters: Tensor | int) -> Tensor:
    """Independent seeds for every counter, from seeds that are already independent.

    Args:
        seeds: int64, such as `derive_seeds` gives.
        counters: integers or int64 tensors that broadcast with `seeds`.
    Returns:
        int64 of the common shape.
    """
    tensors = [seeds, *(torch.as_tensor(counter, dtype=torch.int64) for counter in counters)]
    on_host = all(x.device.type == "cpu" for x in tensors) and not is_traced()
    key, *words = map(_to_words, tensors) if on_host else tensors
    for word in words:
        key = _mix(key + _GOLDEN * (word + 1))
    shape = np.broadcast_shapes(*(tuple(x.shape) for x in tensors))
    return (torch.from_numpy(key) if on_host else key).reshape(shape)


def draw_uniform(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers as a function of seeds, for tasks and perturbations that must not depend on batch or order.

    Args:
        seeds: int64 `[...]`.
        count: of numbers for each seed; fewer are the first of more.
    Returns:
        float64 in [0, 1) with 53 random bits, `[..., count]`.
    """
    words, lanes = _to_words(seeds[..., None]), _to_words(torch.arange(1, count + 1, device=seeds.device))
    bits: Tensor = torch.as_tensor(_shift_right(_mix(words + _GOLDEN * lanes), 11))
    return bits.double() * 2.0**-53


def draw_normal(seeds: Tensor, count: int) -> Tensor:
    """Standard normal numbers as a function of seeds (Box & Muller 1958).

    Args:
        seeds: int64 `[...]`.
        count: of numbers for each seed; they depend on it, so that fewer are not the first of more.
    Returns:
        float64 `[..., count]`.
    """
    half = (count + 1) // 2
    u = draw_uniform(seeds, 2 * half)
    radius, angle = (-2 * (1 - u[..., :half]).log()).sqrt(), 2 * math.pi * u[..., half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :count]


def draw_bits(seeds: Tensor, first: int, count: int, bits: int) -> Tensor:
    """Random bits as a function of seeds and lanes, for stochastic rounding.

    Args:
        seeds: int64 `[...]`.
        first, count: lanes `first` to `first + count - 1` of each seed, so that chunks of one draw agree with the
            whole.
        bits: of each number.
    Returns:
        int64 in [0, 2^bits), `[..., count]`.
    """
    lanes = torch.arange(first + 1, first + count + 1, device=seeds.device)
    drawn: Tensor = _shift_right(_mix(seeds[..., None] + _GOLDEN * lanes), 64 - bits)
    return drawn


def draw_indices(seeds: Tensor, count: int, high: int) -> Tensor:
    """Indices with replacement as a function of seeds, such as those of a mini-batch.

    Args:
        seeds: int64 `[...]`.
        count: of indices for each seed.
        high: of the data set: indices are in [0, high).
    Returns:
        int64 `[..., count]`.
    """
    return (draw_uniform(seeds, count) * high).long().clamp_(max=high - 1)


def make_generator(seed: int | Tensor) -> torch.Generator:
    """A CPU generator of torch's that starts at a 64-bit seed, for draws that torch makes itself, such as permutations
    and initial weights.
    """
    return torch.Generator().manual_seed(int(seed))
