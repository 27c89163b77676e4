"""A deep kernel on properties and molecules that its training has not met, beside kernels without learning to learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.evaluation.molecules.deep_kernel import DEEP, tell_tasks, train_kernel
from lopt.evaluation.molecules.kernels import tell_without_rules
from lopt.evaluation.molecules.measured import Labels
from lopt.tasks.substance import Substance

UNSEEN = (("logP", "rho", "RI", "delta_d", "delta_p", "delta_h"), ("Tm", "Tb", "Hsub", "Hvap", "Tflash"))
"""Kinds of properties that are left out together, as they tell of each other; a kernel is trained without each."""


def judge_unseen(
    folds: Sequence[Sequence[str]], shots: int, tasks: int, *, steps: int = 800, pool: str = "test", seed: int = 0
) -> dict[str, Tensor]:
    """Coefficients of determination on tasks of the properties left out, `[tasks]` by row.

    Args:
        folds: names of properties; tasks are divided evenly among them.
        shots: known labels.
        steps: of training, for each fold.
        pool: whose molecules the tasks are of.
        seed: of the tasks.
    """
    found: dict[str, list[Tensor]] = {}
    for fold, unseen in enumerate(folds):
        family = Substance(shots, unseen=unseen)
        kernel = train_kernel(family, steps)
        drawn = family.sample_all(derive_seeds(seed, f"unseen {fold}", torch.arange(tasks // len(folds))), pool)
        told, _ = tell_tasks(kernel, family, drawn)
        order = torch.arange(drawn["labels"].shape[1])[None]
        given = drawn["labels"][:, :shots]
        mean, std = given.mean(1, keepdim=True), given.std(1, keepdim=True) + 0.1
        for molecules, property, answer in zip(drawn["molecules"], drawn["labels"], told * std + mean, strict=True):
            x, bits = family.inputs[molecules], family.fingerprints[molecules].double()
            labels = Labels(x, x.numpy(), x.double(), bits, property.double(), order[:, :shots], order[:, shots:])
            for name, values in {**tell_without_rules(labels), DEEP: answer[None].double()}.items():
                found.setdefault(name, []).append(labels.score(values))
    return {name: torch.cat(values) for name, values in found.items()}
