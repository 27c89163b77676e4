"""Ridge regression on few labels, with kernels of descriptors and fingerprints, chosen on these labels alone.

Source: Allen 1974, Technometrics 16(1) (PRESS: what is left out, one at a time, in closed form).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lopt.evaluation.molecules.measured import Labels

PENALTIES = tuple(10 ** (k / 2) for k in range(-2, 8))
"""Of ridge regression, in units of a kernel whose diagonal is 100 in the mean."""

DESCRIPTORS, MORGAN, TANIMOTO = "ridge, 217 descriptors", "ridge, Morgan", "Tanimoto kernel"
CHOSEN = "the best of these on the support"


def tell_without_rules(labels: Labels) -> Mapping[str, Tensor]:
    """What is told of the molecules asked for without learning to learn, `[D, others]`, by name."""
    common = labels.fingerprints @ labels.fingerprints.T
    counts = labels.fingerprints.sum(1)
    kernels = {
        DESCRIPTORS: labels.all_descriptors @ labels.all_descriptors.T,
        MORGAN: common,
        TANIMOTO: common / (counts[:, None] + counts - common),
    }
    found, errors = {}, []
    for name, kernel in kernels.items():
        found[name], error = fit_ridge(100 * kernel / kernel.diagonal().mean(), labels)
        errors.append(error)
    best = torch.stack(errors).argmin(0)
    found[CHOSEN] = torch.stack(list(found.values()))[best, torch.arange(len(best))]
    return found


def fit_ridge(kernel: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Ridge regression with an intercept, whose penalty is the best where known labels are left out one at a time.

    Args:
        kernel: `[molecules, molecules]`.
    Returns:
        What is told of the molecules asked for, `[D, others]`, and the mean square error of the labels left out `[D]`.
    """
    known, asked = labels.known, labels.asked
    y = labels.property[known]
    mean = y.mean(1, keepdim=True)
    count = known.shape[1]
    own, other = kernel[known[:, :, None], known[:, None]], kernel[asked[:, :, None], known[:, None]]
    # Features are centred on those of the known molecules.
    other = other - other.mean(2, keepdim=True) - own.mean(1, keepdim=True) + own.mean((1, 2), keepdim=True)
    own = own - own.mean(1, keepdim=True) - own.mean(2, keepdim=True) + own.mean((1, 2), keepdim=True)
    told, errors = [], []
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(own + penalty * torch.eye(count, dtype=own.dtype))
        hat = own @ inverse + 1 / count
        left = (y - (hat @ y[..., None])[..., 0]) / (1 - hat.diagonal(dim1=1, dim2=2)).clamp(min=1e-9)
        errors.append(left.square().mean(1))
        told.append(mean + (other @ inverse @ (y - mean)[..., None])[..., 0])
    least, best = torch.stack(errors).min(0)
    return torch.stack(told)[best, torch.arange(len(best))], least
