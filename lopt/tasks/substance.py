"""Measured properties of substances from a few labels: a layer over descriptors, and a head that follows from labels.

Sources: Stanley et al. 2021, NeurIPS Datasets (FS-Mol: few labels of each target); Raghu et al. 2019, arXiv 1909.09157
(ANIL). Differs from the sources: targets are physical properties, and sums of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lopt.core.names import choose
from lopt.core.random import draw_indices, draw_normal, draw_uniform, fold_in
from lopt.core.tensors import Params
from lopt.tasks.base import POOLS, Task
from lopt.tasks.data.molecules import standardise
from lopt.tasks.data.substances import PROPERTIES, load_substances
from lopt.tasks.module import draw_weights
from lopt.tasks.molecule import FewLabels, cut_pools

MIXED = 3
"""Properties that a target is a sum of, at most."""

NEAR = 4
"""Molecules that a task is drawn from, in units of those it has, at least."""

S = TypeVar("S", bound="Substance")


class Substance(FewLabels):
    """Label = head . features(descriptors) + bias, learned from a few labels; mean squared error.

    A task is one property, or in every second one a sum of up to three with normal weights, of "molecules" `[shots +
    queries]` int64, in every second one of such as are alike along a random direction of the descriptors; "labels"
    `[shots + queries]` have noise. Labels are standardised by those that are learned from, the train split, at every
    step; all others are the queries. Mini-batches are descriptors x `[T, n, descriptors]` and labels y `[T, n]`.
    Descriptors are standardised over all substances, so that features mean the same in all tasks. Pools have different
    molecules.

    Args:
        shots: labels that are known.
        queries: further ones that a task is judged on.
        unseen: names of properties that no task for training has, and that all others are of; by default all pools
            have all properties.
        noise: largest standard deviation of the noise, which is uniform from 0 to it between tasks.
        width: of the hidden layer.
        features: their number.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range, or there is no such property.
        ImportError: rdkit, datamol or chemicals is missing.

    Attributes:
        inputs: float32 `[molecules, descriptors]`.
        fingerprints: float32 `[molecules, 1024]`.
    """

    name = "substance"

    def __init__(
        self,
        shots: int = 16,
        queries: int = 48,
        unseen: Sequence[str] = (),
        noise: float = 0.2,
        width: int = 128,
        features: int = 64,
        horizon: int = 20,
    ) -> None:
        if shots < 2 or min(queries, width, features) < 1 or noise < 0:
            found = f"shots={shots}, queries={queries}, width={width}, features={features}, noise={noise}"
            raise ValueError(
                f"shots must be at least 2, queries, width and features 1 and noise 0 or more, got {found}"
            )
        for name in unseen:
            choose("unseen", name, PROPERTIES)
        self.shots, self.queries, self.noise, self.horizon = shots, queries, noise, horizon
        self.widths = width, features
        data = load_substances()
        self.mean, self.std = data.descriptors.mean(0), data.descriptors.std(0)
        # In an order of its own, as tables are sorted by substance.
        order = draw_uniform(torch.tensor(0, dtype=torch.int64), len(data.values)).argsort()
        self.inputs = standardise(data.descriptors, self.mean, self.std)[order]
        self.drawn_from = self.inputs.double()  # not moved: tasks are drawn on the CPU
        self.fingerprints = torch.from_numpy(data.fingerprints)[order].float()
        values = torch.from_numpy(data.values)[order].float()
        self.known, self.values = ~values.isnan(), values.nan_to_num()
        self.pools = cut_pools(len(values))
        self.properties = {pool: self._list_properties(pool, unseen) for pool in POOLS}

    def _list_properties(self, pool: str, unseen: Sequence[str]) -> Tensor:
        """Columns that a pool has tasks of: those of which it knows enough molecules.

        Raises:
            ValueError: there is none.
        """
        numbers = self.pools[pool]
        enough = self.known[numbers.start : numbers.stop].sum(0) >= self.shots + self.queries
        met = [not unseen or (name in unseen) is (pool != "train") for name in PROPERTIES]
        found = (enough & torch.tensor(met, dtype=torch.bool)).nonzero()[:, 0]
        if not len(found):
            raise ValueError(
                f"the pool {pool} has no property with shots + queries = {self.shots + self.queries} labels, of "
                f"unseen={list(unseen)}: ask for fewer labels or other unseen properties"
            )
        return found

    def to(self: S, device: torch.device | str) -> S:
        self.inputs = self.inputs.to(device)
        return self

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        numbers, properties = self.pools[choose("pool", pool, POOLS)], self.properties[pool]
        part, count = slice(numbers.start, numbers.stop), self.shots + self.queries
        chosen = properties[draw_indices(fold_in(seeds, 0), MIXED, len(properties))]
        shares = draw_uniform(fold_in(seeds, 1), 3)
        # One property, or two or three of them; only one where too few molecules have all.
        mixed = torch.where(shares[:, :1] < 0.5, 1, 2 + (shares[:, 1:2] < 0.5).long()) > torch.arange(MIXED)
        possible = self._find_possible(part, chosen, mixed)
        mixed = mixed & ((possible.sum(1) >= count)[:, None] | (torch.arange(MIXED) == 0))
        possible = self._find_possible(part, chosen, mixed)
        possible &= self._find_alike(part, possible, seeds) | (shares[:, 2:] < 0.5)
        order = draw_uniform(fold_in(seeds, 2), len(numbers)).masked_fill(~possible, 1).argsort(1)[:, :count]
        normal = draw_normal(fold_in(seeds, 3), MIXED + count)
        weights = normal[:, :MIXED] * mixed
        weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-9)
        molecules = numbers.start + order
        labels = (self.values[molecules[..., None], chosen[:, None]] * weights[:, None]).sum(2)
        level = self.noise * draw_uniform(fold_in(seeds, 4), 1)
        return {"molecules": molecules, "labels": (labels + level * normal[:, MIXED:]).float()}

    def _find_possible(self, part: slice, chosen: Tensor, mixed: Tensor) -> Tensor:
        """The molecules of a pool of which all properties of a task are known, `[T, n]`."""
        return (self.known[part][:, chosen] | ~mixed).all(2).T

    def _find_alike(self, part: slice, possible: Tensor, seeds: Tensor) -> Tensor:
        """Those that are the nearest to one of them along a direction: some share of the possible ones, `[T, n]`."""
        width = self.drawn_from.shape[1]
        direction = draw_normal(fold_in(seeds, 5), width) * (draw_uniform(fold_in(seeds, 6), width) < 0.1)
        place = (self.drawn_from[part] @ direction.T).T
        drawn = draw_uniform(fold_in(seeds, 7), 2)
        # The centre is one of those possible, drawn by its rank.
        rank = (drawn[:, :1] * possible.sum(1, keepdim=True)).long()
        ordered = place.masked_fill(~possible, torch.inf).sort(1).values
        far = (place - ordered.gather(1, rank)).abs().masked_fill(~possible, torch.inf)
        least = NEAR * (self.shots + self.queries)
        size = least + drawn[:, 1:] / 2 * (possible.sum(1, keepdim=True) - least).clamp(min=0)
        return far.argsort(1).argsort(1) < size

    def init(self, task: Task, generator: torch.Generator) -> Params:
        inputs, (width, features) = self.inputs.shape[1], self.widths

        def build() -> nn.Module:
            return nn.ModuleDict({"hidden": nn.Linear(inputs, width), "features": nn.Linear(width, features)})

        head = {"head.weight": (features,), "head.bias": ()}
        zeros = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in head.items()}
        return draw_weights(build, generator) | zeros

    def label(self, tasks: Task) -> Tensor:
        return tasks["labels"]

    def predict(self, params: Params, x: Tensor) -> Tensor:
        return embed(params, x) @ params["head.weight"] + params["head.bias"]


def embed(params: Params, x: Tensor) -> Tensor:
    """Features `[..., n, features]` of inputs `[..., n, descriptors]`, of one network for all."""
    hidden = nn.functional.silu(nn.functional.linear(x, params["hidden.weight"], params["hidden.bias"]))
    features = nn.functional.linear(hidden, params["features.weight"], params["features.bias"])
    scaled: Tensor = features / features.shape[-1] ** 0.5
    return scaled
