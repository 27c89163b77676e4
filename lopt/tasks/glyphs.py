"""Few-shot classification of characters, in scripts that were not there in training: an Omniglot out of fonts.

Sources: Lake et al. 2015, Science 350 (Omniglot); Vinyals et al. 2016, arXiv 1606.04080 (N ways, K shots).
Differs from the sources: the drawings are those of printed faces by default, of 14 x 14 pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.random import draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import POOLS, SPLITS, Batch, Task
from lopt.tasks.batched import BatchedLosses
from lopt.tasks.data.drawings import load_drawings
from lopt.tasks.data.splits import to_pixels
from lopt.tasks.few_shot import FewShotClasses
from lopt.tasks.mlp import check_network

NETWORKS = ("conv", "mlp")
SMALLEST = 8
"""Pixels of a side below which no letter can be read."""

G = TypeVar("G", bound="Glyphs")


class Glyphs(FewShotClasses):
    """Say which of a few characters a drawing is of, learned from a drawing or two of each; cross-entropy.

    A task is its "characters" `[ways]` int64, of which the first is class 0 and so on, and which "drawings"
    `[ways, shots + queries]` int64 of them it is about. The train split is the first `shots` of each, at every step;
    all others are the rest. Mini-batches are x `[T, n, 1, size, size]` float32 in [0, 1] and classes y `[T, n]` int64,
    class by class. A metric is the accuracy. Pools have different scripts. By default 37,957 parameters.

    Args:
        ways: classes of a task.
        shots: drawings of each that are learned from.
        queries: other drawings of each that a task is judged on.
        network: "conv" (two 3 x 3 convolutions of stride 2, with `width` and twice as many channels, and a layer of 4
            `width` features, all normalised over a drawing, ReLU between them) or "mlp" (two layers of 4 `width` units
            with ReLU); both end with a layer "head".
        width: see `network`.
        size: pixels of a side.
        data: "dejavu" or "omniglot:FOLDER", read by `load_drawings`.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range or unknown, or the data have too few characters or drawings of one.
        FileNotFoundError: a file of `data` is missing.
    """

    name = "glyphs"
    pool_key = "characters"

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 3,
        network: str = "conv",
        width: int = 16,
        size: int = 14,
        data: str = "dejavu",
        horizon: int = 10,
    ) -> None:
        check_network(width, 2)
        if ways < 2 or min(shots, queries) < 1 or size < SMALLEST:
            found = f"ways={ways}, shots={shots}, queries={queries}, size={size}"
            raise ValueError(f"ways must be at least 2, shots and queries 1 and size {SMALLEST}, got {found}")
        self.ways, self.shots, self.queries, self.horizon = ways, shots, queries, horizon
        self.network, self.width, self.size = choose("network", network, NETWORKS), width, size
        self.images, self.counts, self.pools = load_drawings(data, size)
        self._check_data(data)
        self.module = self.build_network()
        self.batched = BatchedLosses(self.module[1:], F.cross_entropy) if network == "mlp" else None

    def _check_data(self, data: str) -> None:
        few = next((pool for pool, numbers in self.pools.items() if len(numbers) < self.ways), None)
        if few is not None:
            raise ValueError(f"{data} has {len(self.pools[few])} characters for {few}, fewer than ways={self.ways}")
        needed, fewest = self.shots + self.queries, int(self.counts.min())
        if fewest < needed:
            raise ValueError(
                f"shots={self.shots} and queries={self.queries} take {needed} drawings of a character, and {data} has "
                f"{fewest} of some; take fewer"
            )

    def build_network(self, ways: int | None = None) -> nn.Sequential:
        width, size = self.width, self.size
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if self.network == "conv":
            side = ((size + 1) // 2 + 1) // 2
            layers["first"] = nn.Conv2d(1, width, 3, stride=2, padding=1)
            layers["norm1"], layers["relu1"] = nn.GroupNorm(1, width, affine=False), nn.ReLU()
            layers["second"] = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            layers["norm2"], layers["relu2"] = nn.GroupNorm(1, 2 * width, affine=False), nn.ReLU()
            layers["flat"], layers["features"] = nn.Flatten(), nn.Linear(2 * width * side**2, 4 * width)
            layers["norm3"] = nn.LayerNorm(4 * width, elementwise_affine=False)
        else:
            layers["flat"], layers["first"], layers["relu1"] = nn.Flatten(), nn.Linear(size**2, 4 * width), nn.ReLU()
            layers["features"], layers["relu2"] = nn.Linear(4 * width, 4 * width), nn.ReLU()
        layers["head"] = nn.Linear(4 * width, ways or self.ways)
        return nn.Sequential(layers)

    def pick_examples(self, classes: Tensor, shares: Tensor) -> Tensor:
        return to_pixels(self.images[classes, (shares * self.counts[classes]).long()])[:, None]

    def to(self: G, device: torch.device | str) -> G:
        self.images = self.images.to(device)
        return super().to(device)

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        numbers = self.pools[choose("pool", pool, POOLS)]
        most, needed = self.images.shape[1], self.shots + self.queries
        drawn = draw_uniform(seeds, len(numbers) + self.ways * most)
        characters = numbers.start + drawn[:, : len(numbers)].argsort(1)[:, : self.ways]
        order = drawn[:, len(numbers) :].reshape(-1, self.ways, most)
        missing = torch.arange(most) >= self.counts[characters][..., None]
        return {"characters": characters, "drawings": (order + missing.double()).argsort(2)[..., :needed]}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        support = choose("split", split, SPLITS) == "train"
        which = tasks["drawings"][..., : self.shots] if support else tasks["drawings"][..., self.shots :]
        x = to_pixels(self.images[tasks["characters"][..., None], which])
        y = self.number_classes(len(x), which.shape[-1], x.device)
        return {"x": x.flatten(1, 2)[:, :, None], "y": y}

    def losses(self, params: Params, batch: Batch) -> Tensor:
        if self.batched is None:
            return super().losses(params, batch)
        return self.batched(params, batch["x"].flatten(2), batch["y"])
