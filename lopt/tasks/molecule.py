"""Properties of molecules from a few labels: descriptors in, a mixture of other descriptors out, linearly.

Sources: Stanley et al. 2021, NeurIPS Datasets (FS-Mol: few labels of each target); Raghu et al. 2019, arXiv 1909.09157
(ANIL). Differs from the sources: training targets are computed, not measured; the network is one scale for each input.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import draw_indices, draw_normal, draw_uniform, fold_in
from lopt.core.tensors import Params
from lopt.tasks.base import POOLS, SPLITS, Batch, Task, TaskFamily
from lopt.tasks.data.molecules import load_library, standardise

MIXED = 6
"""Descriptors that are mixed into a target."""

RIDGE = 10.0

M = TypeVar("M", bound="Molecule")


class FewLabels(TaskFamily):
    """Tasks of "molecules" `[shots + queries]` int64, of which the first are of known label; mean squared error.

    Attributes:
        shots: labels that are known, the train split; all others are the queries.
        inputs: float32 `[molecules, inputs]`.
        pools: numbers of the molecules of each pool.
    """

    judged = "inner_valid"
    pool_key = "molecules"
    shots: int
    inputs: Tensor
    pools: dict[str, range]

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    @abstractmethod
    def label(self, tasks: Task) -> Tensor:
        """Labels of the tasks' molecules, `[T, shots + queries]`, before they are standardised by the known ones."""

    @abstractmethod
    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Labels `[n]`, standardised, of one task's molecules with inputs `[n, inputs]`."""

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        known, labels = choose("split", split, SPLITS) == "train", self.label(tasks)
        support = labels[:, : self.shots]
        labels = (labels - support.mean(1, keepdim=True)) / (support.std(1, keepdim=True) + 0.1)
        part = slice(self.shots) if known else slice(self.shots, None)
        return {"x": self.inputs[tasks["molecules"][:, part]], "y": labels[:, part]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        return self.batch(tasks, tasks["molecules"], split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (self.predict(params, batch["x"]) - batch["y"]).square().mean()


def cut_pools(count: int) -> dict[str, range]:
    """Numbers of `count` molecules by pool: a tenth for validation and for tests, the rest for training."""
    tenth = count // 10
    return {
        "train": range(count - 2 * tenth),
        "outer_valid": range(count - 2 * tenth, count - tenth),
        "test": range(count - tenth, count),
    }


class Molecule(FewLabels):
    """Label = head . (scale * descriptors) + bias, learned from a few labels; mean squared error.

    A task is a mixture of six descriptors with normal weights, "weights" `[6]` and "targets" `[6]` int64, of mean 0 and
    variance 1 over all molecules, with "noise" `[shots + queries]` on the labels of its "molecules" `[shots + queries]`
    int64. Labels are standardised by those that are learned from, the train split, at every step; all others are the
    queries. Mini-batches are inputs x `[T, n, inputs]` and labels y `[T, n]`. No descriptor is both input and target;
    targets are those that a linear regression on the inputs tells well. Pools have different molecules. By default 135
    parameters: "scale", "head.weight" `[67]` and "head.bias" `[]`.

    Args:
        shots: labels that are known.
        queries: further ones that a task is judged on.
        noise: largest standard deviation of the noise, which is uniform from 0 to it between tasks.
        told: coefficient of determination from which on a descriptor is a target.
        data: "nci" or "smiles:FILE", read by `load_library`.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range, or too few targets are told as well as that.
        FileNotFoundError: there is no such file.
        ImportError: rdkit or datamol is missing.
    """

    name = "molecule"

    def __init__(
        self,
        shots: int = 16,
        queries: int = 48,
        noise: float = 0.5,
        told: float = 0.7,
        data: str = "nci",
        horizon: int = 20,
    ) -> None:
        if shots < 2 or queries < 1 or noise < 0 or not 0 <= told < 1:
            found = f"shots={shots}, queries={queries}, noise={noise}, told={told}"
            raise ValueError(f"shots must be at least 2, queries 1, noise 0 and told from 0 to below 1, got {found}")
        self.shots, self.queries, self.noise, self.horizon = shots, queries, noise, horizon
        library = load_library(data)
        self.inputs = standardise(library.descriptors[:, library.inputs])
        targets = standardise(library.descriptors[:, library.targets])
        self.targets = targets[:, _find_told(self.inputs, targets, told)]
        if self.targets.shape[1] < MIXED:
            raise ValueError(
                f"told={told} leaves {self.targets.shape[1]} targets of {data}, fewer than {MIXED}; lower it"
            )
        self.mean = self.targets.mean(0)  # not 0, as they are bounded
        self.covariance = self.targets.T.cov(correction=0)
        self.pools = cut_pools(len(self.inputs))
        if (tests := len(self.pools["test"])) < shots + queries:
            raise ValueError(f"{data} has {tests} molecules for tests, fewer than shots + queries = {shots + queries}")

    def to(self: M, device: torch.device | str) -> M:
        self.inputs, self.targets = self.inputs.to(device), self.targets.to(device)
        self.mean, self.covariance = self.mean.to(device), self.covariance.to(device)
        return self

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        numbers, count = self.pools[choose("pool", pool, POOLS)], self.shots + self.queries
        order = draw_uniform(fold_in(seeds, 0), len(numbers)).argsort(1)[:, :count]
        normal = draw_normal(fold_in(seeds, 1), MIXED + count)
        level = self.noise * draw_uniform(fold_in(seeds, 2), 1)
        return {
            "molecules": numbers.start + order,
            "targets": draw_indices(fold_in(seeds, 3), MIXED, self.targets.shape[1]),
            "weights": normal[:, :MIXED].float(),
            "noise": (level * normal[:, MIXED:]).float(),
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        width = self.inputs.shape[1]
        return {
            "scale": 1 + 0.1 * torch.randn(width, generator=generator, dtype=torch.float32),
            "head.weight": torch.zeros(width, dtype=torch.float32),
            "head.bias": torch.zeros((), dtype=torch.float32),
        }

    def label(self, tasks: Task) -> Tensor:
        mixed, weights = tasks["targets"], tasks["weights"]
        spread = self.covariance[mixed[:, :, None], mixed[:, None]]
        size = (weights[:, None] @ spread @ weights[..., None])[:, 0].clamp(min=1e-12).sqrt()
        told = self.targets[tasks["molecules"][..., None], mixed[:, None]] - self.mean[mixed][:, None]
        labels: Tensor = (told * weights[:, None]).sum(2) / size + tasks["noise"]
        return labels

    def losses(self, params: Params, batch: Batch) -> Tensor:
        weight = (params["scale"] * params["head.weight"])[..., None]
        found = (batch["x"] @ weight)[..., 0] + params["head.bias"][:, None]
        return (found - batch["y"]).square().mean(1)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        return x @ (params["scale"] * params["head.weight"]) + params["head.bias"]


def _find_told(inputs: Tensor, targets: Tensor, told: float) -> list[int]:
    """The targets that ridge regression on the inputs tells at least so well, by its coefficient of determination."""
    x, y = inputs.double().numpy(), targets.double().numpy()
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    left, spread = ((y - x @ weights) ** 2).mean(0), y.var(0)
    return [i for i in range(y.shape[1]) if spread[i] > 0 and left[i] <= (1 - told) * spread[i]]
