"""Texts as numbers: how often groups of letters and words are there, in buckets that a hash names.

Source: Weinberger et al. 2009, arXiv 0902.2206 (feature hashing). Differs from the source: counts have no sign.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

LENGTHS = (3, 4)
"""Of groups of letters, within a word with its borders."""


def count_ngrams(texts: Sequence[str], buckets: int) -> Tensor:
    """Counts uint8 `[n, buckets]`, at most 255."""
    counts = torch.zeros(len(texts), buckets, dtype=torch.uint8)
    for i, text in enumerate(texts):
        found = Counter(zlib.crc32(gram.encode()) % buckets for gram in list_ngrams(text))
        counts[i, list(found)] = torch.tensor(list(found.values()), dtype=torch.int64).clamp(max=255).to(torch.uint8)
    return counts


def list_ngrams(text: str) -> list[str]:
    """The words of a text and, within each, all groups of three and four letters; a word's borders are letters."""
    grams = []
    for word in text.split():
        bordered = f"<{word}>"
        grams.append(f"={bordered}")
        grams += [bordered[i : i + n] for n in LENGTHS for i in range(len(bordered) - n + 1)]
    return grams


def weigh_counts(counts: Tensor) -> Tensor:
    """Vectors of length 1 with the logarithms of 1 + counts, float32, of the shape of the counts."""
    weights: Tensor = counts.float().log1p()
    size: Tensor = weights.norm(dim=-1, keepdim=True)
    return weights / size.clamp(min=1e-12)
