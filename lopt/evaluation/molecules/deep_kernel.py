"""A kernel of learned features, of descriptors and of fingerprints, whose parts and noise are learned over properties.

Sources: Wilson et al. 2016, arXiv 1511.02222 (deep kernel learning); Patacchiola et al. 2020, arXiv 1910.05199 (over
tasks); Chen et al. 2022, arXiv 2205.02708 (of molecules). Differs from the sources: it is trained by the error of
queries, not by a likelihood; a Tanimoto kernel is a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lopt.core.random import derive_seeds, make_generator
from lopt.evaluation.molecules.measured import Labels
from lopt.tasks.base import Task
from lopt.tasks.data.molecules import standardise
from lopt.tasks.substance import Substance, embed

DEEP = "deep kernel, solved"
INTERCEPT = 10.0
"""Variance of the intercept, in units of the labels'."""

WORST = 3.0
"""An error of a task above this, in units of its labels' variance, counts as this."""


class DeepKernel(nn.Module):
    """k = sum over parts of w_part k_part: of features and of scaled descriptors the inner product, and Tanimoto's.

    Args:
        family: whose network the features are of, as it is drawn for a task.
        seed: of the network.
    """

    def __init__(self, family: Substance, seed: int = 0) -> None:
        super().__init__()
        width = family.inputs.shape[1]
        drawn = family.init({}, make_generator(seed))
        self.network = nn.ParameterDict(
            {k.replace(".", "_"): nn.Parameter(p) for k, p in drawn.items() if not k.startswith("head")}
        )
        self.scale = nn.Parameter(torch.full((width,), width**-0.5, dtype=torch.float32))
        self.log_weights = nn.Parameter(torch.tensor([0.0, -1.0, -1.0], dtype=torch.float32))
        self.log_noise = nn.Parameter(torch.tensor(-1.0, dtype=torch.float32))

    def tell(self, known: Sequence[Tensor], labels: Tensor, asked: Sequence[Tensor]) -> Tensor:
        """Labels `[..., m]` of other molecules: the mean of a Gaussian process; differentiable.

        Args:
            known, asked: inputs `[..., n, descriptors]` and fingerprints `[..., n, 1024]`, of n and of m molecules.
            labels: `[..., n]`, of mean 0 and variance 1 or so.
        """
        (x, bits), (others, other_bits) = known, asked
        params = {k.replace("_", "."): p for k, p in self.network.items()}
        features, told = embed(params, x), embed(params, others)
        x, others = x * self.scale, others * self.scale
        w = self.log_weights.exp()
        own = w[0] * features @ features.mT + w[1] * x @ x.mT + w[2] * find_tanimoto(bits, bits) + INTERCEPT
        other = w[0] * told @ features.mT + w[1] * others @ x.mT + w[2] * find_tanimoto(other_bits, bits) + INTERCEPT
        noise = self.log_noise.exp() * torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        found: Tensor = (other @ torch.linalg.solve(own + noise, labels[..., None]))[..., 0]
        return found


def find_tanimoto(first: Tensor, second: Tensor) -> Tensor:
    """Bits in common over bits in either, `[..., n, m]`, of fingerprints `[..., n, bits]` and `[..., m, bits]`."""
    common = first @ second.mT
    return common / (first.sum(-1)[..., :, None] + second.sum(-1)[..., None, :] - common).clamp(min=1)


def train_kernel(
    family: Substance, steps: int = 800, *, tasks: int = 16, learning_rate: float = 2e-3, seed: int = 0
) -> DeepKernel:
    """A kernel that tells the family's properties for training.

    Args:
        steps: of AdamW, whose learning rates fall to 0 as a cosine; five times as large for scales, weights and noise.
        tasks: of a step.
        seed: of the network and of the tasks.
    """
    kernel = DeepKernel(family, seed)
    rest = [kernel.scale, kernel.log_weights, kernel.log_noise]
    groups: list[dict[str, Any]] = [{"params": kernel.network.parameters()}]
    groups.append({"params": rest, "lr": 5 * learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        seeds = derive_seeds(seed, "deep kernel", step * tasks + torch.arange(tasks))
        told, right = tell_tasks(kernel, family, family.sample_all(seeds))
        errors = (told - right).square().mean(1) / right.var(1)
        optimizer.zero_grad()
        errors.clamp(max=WORST).mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(kernel.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return kernel.requires_grad_(False)


def tell_tasks(kernel: DeepKernel, family: Substance, tasks: Task) -> tuple[Tensor, Tensor]:
    """What is told of the queries of T tasks, and what is right, standardised by the known labels, `[T, queries]`."""
    support, queries = (family.batch(tasks, tasks["molecules"], split) for split in ("train", "inner_valid"))
    bits = family.fingerprints[tasks["molecules"]]
    known, asked = (support["x"], bits[:, : family.shots]), (queries["x"], bits[:, family.shots :])
    return kernel.tell(known, support["y"], asked), queries["y"]


def tell_by_kernel(kernel: DeepKernel, family: Substance, labels: Labels) -> Tensor:
    """What is told of the molecules asked for, `[D, others]`."""
    y = labels.property[labels.known]
    mean, std = y.mean(1, keepdim=True), y.std(1, keepdim=True).clamp(min=1e-6)
    given = ((y - mean) / std).float()
    x, bits = standardise(labels.descriptors, family.mean, family.std), labels.fingerprints.float()
    found = [
        kernel.tell((x[known], bits[known]), values, (x[asked], bits[asked]))
        for known, values, asked in zip(labels.known, given, labels.asked, strict=True)
    ]
    return torch.stack(found).double() * std + mean
