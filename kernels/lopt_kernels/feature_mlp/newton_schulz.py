"""Newton-Schulz steps towards the nearest orthogonal matrix, for all matrices of a shape at once.

Source: Jordan et al. 2024 (Muon). The products are cuBLAS's: batched, they fill the GPU, and their precision is that of
`torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-8  # added to the norm


def orthogonalize(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of `[..., rows, cols]`, approximately: five steps of a quintic iteration.

    Singular values come near 1, not to it. Every matrix is divided by its Frobenius norm first. Differentiable; in the
    dtype of x.
    """
    a, b, c = COEFFICIENTS
    shape, tall = x.shape, x.shape[-2] > x.shape[-1]
    x = x.flatten(0, -3) if x.ndim > 2 else x[None]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


def orthogonalize_equal(stacks: Iterable[Tensor]) -> None:
    """`orthogonalize` in place; each stack `[k, ..., rows, cols]` is all there is of its shape.

    So the number of products grows with the number of shapes, and not with that of matrices.
    """
    for stack in stacks:
        stack.copy_(orthogonalize(stack))
