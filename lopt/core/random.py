"""Randomness that is a function of (seed, stream, counters): runs resume bitwise without any generator's state.

Nothing in lopt draws from torch's global generator. A draw is named by a seed, the name of its stream and
counters (slot, episode, step, ...), so a run needs no generator state to resume bitwise and a task draws the
same numbers whatever batch, process or order it runs in. The bits are those of `lopt_kernels.launching.random`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from lopt_kernels.launching.random import GOLDEN, Words, fold, mix, shift_right
from torch import Tensor

from lopt.core.tensors import is_traced


def _is_on_host(tensors: Iterable[Tensor]) -> bool:
    """Whether arithmetic is outside of graphs and may be numpy's."""
    return all(x.is_cpu for x in tensors) and not is_traced()


def _to_words(x: Tensor) -> Words:
    """An array of a dimension at least, as numpy's numbers do not wrap silently."""
    return x.numpy() if x.ndim else x.numpy().reshape(1)


def derive_seeds(seed: int, stream: str, *counters: Tensor | int) -> Tensor:
    """Independent 64-bit seeds, one per element of the broadcast `counters`.

    Args:
        seed: the run's seed.
        stream: what is drawn ("batch", "init", ...); streams never collide by accident.
        counters: integers or int64 tensors that broadcast together.
    Returns:
        int64 tensor of the counters' broadcast shape (0-dim when all are integers).
    """
    return fold_in(torch.tensor(_name_stream(seed, stream), dtype=torch.int64), *counters)


@lru_cache(maxsize=4096)
def _name_stream(seed: int, stream: str) -> int:
    """The 64 bits, signed, that a stream's seeds begin with."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def fold_in(seeds: Tensor, *counters: Tensor | int) -> Tensor:
    """Independent seeds for every counter, from seeds that are already independent.

    Args:
        seeds: int64, such as `derive_seeds` gives.
        counters: integers or int64 tensors that broadcast with `seeds`.
    Returns:
        int64 of the common shape.
    """
    tensors = [seeds, *(torch.as_tensor(counter, dtype=torch.int64) for counter in counters)]
    on_host = _is_on_host(tensors)
    key, *words = map(_to_words, tensors) if on_host else tensors
    for word in words:
        key = fold(key, word)
    if not on_host:
        return key
    folded = torch.from_numpy(key)
    return folded if any(x.ndim for x in tensors) else folded.reshape(())


def draw_uniform(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers as a function of seeds, for tasks and perturbations that must not depend on batch or order.

    Args:
        seeds: int64 `[...]`.
        count: of numbers for each seed; fewer are the first of more.
    Returns:
        float64 in [0, 1) with 53 random bits, `[..., count]`.
    """
    numbers = seeds[..., None], torch.arange(1, count + 1, device=seeds.device)
    words, lanes = map(_to_words, numbers) if _is_on_host(numbers) else numbers
    bits: Tensor = torch.as_tensor(shift_right(mix(words + GOLDEN * lanes), 11))
    return bits.double() * 2.0**-53


def draw_truncated_normal(shape: Sequence[int], std: float, generator: torch.Generator) -> Tensor:
    """Normal numbers of mean 0, drawn anew where they lie beyond two standard deviations.

    From one generator they are the same with every torch, whose own `trunc_normal_` is not that of 2.10 any more.

    Returns:
        float32 `[*shape]`.
    """
    drawn = torch.empty(*shape, dtype=torch.float32).normal_(0, std, generator=generator)
    while bool((beyond := drawn.abs() > 2 * std).any()):
        drawn = torch.where(beyond, torch.empty_like(drawn).normal_(0, std, generator=generator), drawn)
    return drawn


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
