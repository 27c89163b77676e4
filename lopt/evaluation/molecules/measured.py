"""Known labels, drawn anew many times, and what a base learner tells of all others after a rule's steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lopt.core.random import derive_seeds, draw_uniform
from lopt.core.tensors import Params
from lopt.rules import LearnedInit
from lopt.tasks.data.molecules import Array, load_library, load_measured, standardise
from lopt.tasks.molecule import Molecule

DRAWS = 50
FLOOR = -1.0
"""A coefficient of determination below this counts as this, so that no draw outweighs the others."""


class Labels(NamedTuple):
    """A set of molecules with D draws of known labels.

    Attributes:
        inputs: a library's, standardised over the set, float32 `[molecules, inputs]`.
        descriptors: as they are, numpy's float64 `[molecules, names]`.
        all_descriptors: standardised over the set, float64 `[molecules, names]`.
        fingerprints: float64 `[molecules, bits]`.
        property: float64 `[molecules]`.
        known, asked: numbers of molecules, `[D, shots]` and `[D, others]`.
    """

    inputs: Tensor
    descriptors: Array
    all_descriptors: Tensor
    fingerprints: Tensor
    property: Tensor
    known: Tensor
    asked: Tensor

    def score(self, found: Tensor) -> Tensor:
        """Coefficients of determination on the molecules asked for, `[D]`, at least `FLOOR`.

        Args:
            found: what is told of them, `[D, others]`.
        """
        right = self.property[self.asked]
        spread = (right - right.mean(1, keepdim=True)).square().sum(1)
        return (1 - (found - right).square().sum(1) / spread).clamp(min=FLOOR)


def draw_labels(name: str, shots: int, *, draws: int = DRAWS, seed: int = 0, data: str = "nci") -> Labels:
    """Known labels of a measured set.

    Args:
        name: one of `lopt.tasks.data.molecules.MEASURED`.
        shots: labels of a draw.
        data: the library that says which descriptors are inputs.
    """
    measured, library = load_measured(name), load_library(data)
    count = len(measured.property)
    order = draw_uniform(derive_seeds(seed, f"labels of {name}", torch.arange(draws)), count).argsort(1)
    return Labels(
        standardise(measured.descriptors[:, library.inputs]),
        measured.descriptors,
        standardise(measured.descriptors).double(),
        torch.from_numpy(measured.fingerprints),
        torch.from_numpy(measured.property),
        order[:, :shots],
        order[:, shots:],
    )


def predict_by_rule(rule: LearnedInit, family: Molecule, labels: Labels, num_steps: int) -> Tensor:
    """What is told of the molecules asked for, `[D, others]`, after steps of a rule on the known labels.

    Args:
        num_steps: at least 1.
    """
    y = labels.property[labels.known]
    mean, std = y.mean(1, keepdim=True), y.std(1, keepdim=True).clamp(min=1e-6)
    batch = {"x": labels.inputs[labels.known], "y": ((y - mean) / std).float()}
    params: Params = {k: p.detach().expand(len(y), *p.shape) for k, p in rule.initial_params.items()}
    state = rule.init_state(params, 1)
    planned = torch.full_like(state.step, num_steps)
    for _ in range(num_steps):
        leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
        with torch.enable_grad():
            losses = family.losses(leaves, batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        with torch.no_grad():
            params, state = rule.update(dict(zip(leaves, grads, strict=True)), params, state, losses.detach(), planned)
    with torch.no_grad():
        found = torch.stack(
            [
                family.predict({k: p[i] for k, p in params.items()}, labels.inputs[labels.asked[i]])
                for i in range(len(y))
            ]
        )
    return found.double() * std + mean
