"""Ridge regression as the head of a learned embedding, solved and not stepped; the embedding is a scale of each input.

Source: Bertinetto et al. 2019, arXiv 1805.08136 (R2-D2). Differs from the source: the embedding has no layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lopt.core.random import derive_seeds
from lopt.evaluation.molecules.measured import Labels
from lopt.tasks.molecule import Molecule

SOLVED = "ridge on learned scales, solved"


class Scales(NamedTuple):
    """What is learned.

    Attributes:
        scale: of the inputs, float32 `[inputs]`.
        penalty: of the ridge regression, float32 `[]`.
    """

    scale: Tensor
    penalty: Tensor

    def tell(self, known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """Labels `[..., m]` of other molecules, by ridge regression with an intercept; differentiable.

        Args:
            known, asked: inputs `[..., n, inputs]` and `[..., m, inputs]`.
            labels: `[..., n]`.
        """
        x, others = known * self.scale, asked * self.scale
        middle, mean = x.mean(-2, keepdim=True), labels.mean(-1, keepdim=True)
        x, others = x - middle, others - middle
        gram = x @ x.mT + self.penalty * torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        weights = x.mT @ torch.linalg.solve(gram, (labels - mean)[..., None])
        found: Tensor = (others @ weights)[..., 0] + mean
        return found


def train_scales(
    family: Molecule, steps: int = 300, *, tasks: int = 16, learning_rate: float = 1e-2, seed: int = 0
) -> Scales:
    """Scales and a penalty that tell the family's properties for training.

    Args:
        steps: of Adam, whose learning rate falls to 0 as a cosine.
        tasks: of a step.
        seed: of the tasks.
    """
    width = family.inputs.shape[1]
    scale = nn.Parameter(torch.full((width,), width**-0.5, dtype=torch.float32))
    log_penalty = nn.Parameter(torch.full((), -1.0, dtype=torch.float32))
    optimizer = torch.optim.Adam([scale, log_penalty], learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        seeds = derive_seeds(seed, "closed form", step * tasks + torch.arange(tasks))
        drawn = family.sample_all(seeds)
        support, queries = (family.batch(drawn, seeds, split) for split in ("train", "inner_valid"))
        told = Scales(scale, log_penalty.exp()).tell(support["x"], support["y"], queries["x"])
        loss = (told - queries["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([scale, log_penalty], 1.0)
        optimizer.step()
        schedule.step()
    return Scales(scale.detach(), log_penalty.detach().exp())


def tell_by_scales(scales: Scales, labels: Labels) -> Tensor:
    """What is told of the molecules asked for, `[D, others]`."""
    y = labels.property[labels.known]
    mean, std = y.mean(1, keepdim=True), y.std(1, keepdim=True).clamp(min=1e-6)
    given = ((y - mean) / std).float()
    found = [
        scales.tell(labels.inputs[known], values, labels.inputs[asked])
        for known, values, asked in zip(labels.known, given, labels.asked, strict=True)
    ]
    return torch.stack(found).double() * std + mean
