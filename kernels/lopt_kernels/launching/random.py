"""splitmix64 (Steele et al. 2014): random bits as a function of a seed and counters, in torch, numpy and Triton.

Its arithmetic is that of signed 64-bit integers, which wrap around. Whoever rounds at random, a kernel, its reference
or the step of an optimizer in torch, takes the bits from here, so that all of them round alike.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt_kernels.launching.language import constant, jit, tl

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
MIX_1 = -0x40A7B892E31B1A47
MIX_2 = -0x6B2FB644ECCEEE15

Words = Any
"""int64 with wrap-around: a tensor, or numpy's array, whose small operations take a fifth of the time on a CPU, but of
which a compiler sees nothing."""


def shift_right(x: Words, bits: int) -> Words:
    """Logical (zero-filling) right shift, which torch does not have, and numpy has for unsigned integers.

    The generator is defined on unsigned words.

    Args:
        x: int64 of any shape.
        bits: from 1 to 63.
    """
    if isinstance(x, np.ndarray):
        return (x.view(np.uint64) >> np.uint64(bits)).view(np.int64)
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Words) -> Words:
    """The finaliser of splitmix64: a bijection of 64-bit words that turns neighbouring ones into unrelated ones.

    Counters and lanes are neighbours before it, and random bits behind it.

    Args:
        x: int64 of any shape.
    """
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    return x ^ shift_right(x, 31)


def fold(seeds: Words, counters: Words) -> Words:
    """Independent seeds for every counter: the outputs number `counters` of the generators that start at `seeds`.

    A step's seeds are those of its parameters folded with their counters.

    Args:
        seeds, counters: int64, broadcast.
    """
    return mix(seeds + GOLDEN * (counters + 1))


def draw_bits(seeds: Tensor, first: int, count: int, bits: int) -> Tensor:
    """Random bits as a function of seeds and lanes, for stochastic rounding.

    Args:
        seeds: int64 `[...]`.
        first, count: lanes `first` to `first + count - 1` of each seed: chunks of a draw agree with the whole.
        bits: of each number.
    Returns:
        int64 in [0, 2^bits), `[..., count]`.
    """
    lanes = torch.arange(first + 1, first + count + 1, device=seeds.device)
    drawn: Tensor = shift_right(mix(seeds[..., None] + GOLDEN * lanes), 64 - bits)
    return drawn


# -- the same in kernels -----------------------------------------------------------------------------------------------

_GOLDEN, _MIX_1, _MIX_2 = constant(GOLDEN), constant(MIX_1), constant(MIX_2)


@jit
def fold_seed(seed, counter):
    """`fold` of an int64 seed with int64 counters, in a kernel.

    It makes a step's seed of a parameter's, and a lane's bits of a step's seed.
    """
    x = seed + _GOLDEN * (counter + 1)
    x = (x ^ shift_seed(x, 30)) * _MIX_1
    x = (x ^ shift_seed(x, 27)) * _MIX_2
    return x ^ shift_seed(x, 31)


@jit
def shift_seed(x, BITS: tl.constexpr):
    """`shift_right` in a kernel, by a cast to unsigned words: int64 of any shape, zeros from above."""
    return (x.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)
