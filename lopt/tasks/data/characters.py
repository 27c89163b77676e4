"""What the families on text share: windows of a text, the next character to be said at every place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.random import draw_indices
from lopt.tasks.base import Batch, Task
from lopt.tasks.data.splits import load_text
from lopt.tasks.module import ModuleTask

WINDOWS = 1024
"""The windows that stand for a whole split, at most."""


class CharacterTask(ModuleTask):
    """Cross-entropy, in nats per character, of a module's logits `[B, length, characters]` from codes `[B, length]`.

    Mini-batches are codes x `[T, batch_size, length]` and the codes y one place further on, both int64. Whole splits
    are windows that follow one another, evenly spaced if there are more than `WINDOWS`.

    Args:
        build: makes the module.
        data: "pydoc" or "text:FILE", read by `load_text`.
        characters: number of codes; rarer characters than that share one.
        length: characters in a window.
        batch_size: windows per batch, starting anywhere, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: `length` is below 1 or the smallest split no longer, or the text cannot be divided.
        FileNotFoundError: the file of `data` is missing.

    Attributes:
        vocabulary: the characters of the codes from 1 on; code 0 is any other.
    """

    def __init__(
        self, build: Callable[[], nn.Module], data: str, characters: int, length: int, batch_size: int, horizon: int
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        text, self.vocabulary = load_text(data, characters)
        shortest = min(map(len, text.values()))
        if shortest <= length:
            raise ValueError(f"length {length} needs splits of more characters, the smallest of {data} has {shortest}")
        self.length = length
        splits = {split: (codes, codes) for split, codes in text.items()}
        super().__init__(build, cross_entropy, splits, batch_size, horizon)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        codes, _ = self._split(split)
        return self._cut(codes, draw_indices(seeds, self.batch_size, len(codes) - self.length))

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        codes, _ = self._split(split)
        places = torch.arange(0, len(codes) - self.length, self.length, device=codes.device)
        if len(places) > WINDOWS:
            places = places[torch.arange(WINDOWS, device=codes.device) * len(places) // WINDOWS]
        return {key: x.expand(count, *x.shape) for key, x in self._cut(codes, places).items()}

    def _cut(self, codes: Tensor, places: Tensor) -> Batch:
        """Windows starting at `places` `[...]`."""
        windows = codes[places[..., None] + torch.arange(self.length + 1, device=places.device)].long()
        return {"x": windows[..., :-1], "y": windows[..., 1:]}


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Nats per character, averaged over all places of all windows.

    Args:
        logits: `[B, length, characters]`.
        codes: `[B, length]` int64, the right ones.
    """
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
