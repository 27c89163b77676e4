"""Celo2: a per-parameter MLP whose steps are orthogonalised and scaled to unit size; the schedule is the user's.

Source: Celo2, ICLR 2026, arXiv 2602.19142.
Differs from the source: the MLP's outputs beyond the first have no effect there and are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from lopt_kernels.feature_mlp.newton_schulz import orthogonalize
from lopt_kernels.feature_mlp.scaled_move import EPS as STEP_EPS
from torch import Tensor

from lopt.rules.adam import AdamW
from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.factored_mlp import FEATURE_NAMES, FactoredMLP
from lopt.rules.building_blocks.feature_mlp import Inputs, TensorMLP
from lopt.rules.layout import Layout
from lopt.rules.stages import Elements, Finished, Means, count_elements

BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's
VECTOR_FEATURES = 15  # up to g rs
EMBEDDING_NAMES = ("emb", "wte", "wpe")  # parts of names, beside all that contain "embed"


class Celo2(FactoredMLP):
    """`p <- p - step_mult (u + weight_decay p)`: u is the MLP's output, orthogonalised (matrices) and scaled to rms 1.

    A convolution counts as one matrix (in, out) per position of its window. Vectors, scalars and parameters that
    an embedding's name gives away are left to AdamW (betas 0.9 and 0.95) with learning rate `step_mult adamw_mult`.

    "embed" anywhere in a name counts, as in the source: route=False, and groups of your own, where that is too much.
    With step_mult 1, `lr` and `weight_decay` of the optimizer are those of the paper.

    Args:
        hidden: width of the MLP's two hidden layers.
        step_mult: size of the step; 0.001 in meta-training.
        adamw_mult: of AdamW's learning rate; 20 in meta-training.
        route: False uses the MLP for every parameter.
        seed: of the initial meta-weights.
    """

    name = "celo2"
    quick_config: ClassVar = {"step_mult": 0.2, "adamw_mult": 1.0}
    orthogonalizes = True
    rs_eps = 1e-8
    second_decay = 0.95
    norm_eps = 1e-9
    exp_mult = 0.0
    feature_names = FEATURE_NAMES

    def __init__(
        self,
        hidden: int = 8,
        step_mult: float = 1e-3,
        adamw_mult: float = 20.0,
        route: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__([len(FEATURE_NAMES), hidden, hidden, 1], seed)
        self.step_mult = step_mult
        self.adamw_options = {"lr": step_mult * adamw_mult, "betas": BETAS, "eps": EPS}
        self.decay_scale = step_mult
        self.adamw: AdamW | None = None
        # AdamW is no part of what is learned: its weights are frozen and come from the options.
        if route:
            self.adamw = AdamW(step_mult * adamw_mult, *BETAS, EPS, weight_decay=0.0).requires_grad_(False)
            self.adamw.decay_scale = step_mult * adamw_mult

    def delegate(self, name: str, layout: Layout) -> Rule | None:
        embeds = "embed" in name or any(part in EMBEDDING_NAMES for part in name.split("."))
        return self.adamw if layout.factored is None or embeds else None

    def norm_axes(self, layout: Layout) -> tuple[int, ...]:
        return layout.last

    def find_inputs(self, layout: Layout) -> Inputs:
        """Vectors have the features up to g rs only."""
        inputs = super().find_inputs(layout)
        return inputs._replace(elements=[slice(VECTOR_FEATURES)]) if layout.factored is None else inputs

    def element_features(self, e: Elements) -> list[features.Piece]:
        pieces = super().element_features(e)
        return pieces[:-5] if e.layout.factored is None else pieces  # neither averages nor m F

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return mean_squares.new_ones(mean_squares.shape[:-1])

    def finish(self, delta: Tensor, read: Callable[[], Elements], decided: TensorMLP, layout: Layout) -> Finished:
        """The step orthogonalised and scaled to rms `step_mult`, per matrix."""
        if self.orthogonalizes and layout.factored is not None:
            delta = orthogonalize(delta.movedim(layout.last, (-2, -1))).movedim((-2, -1), layout.last)
        # A factor for each matrix instead of a scaled step: the caller multiplies where it writes.
        count = count_elements(layout.last, layout)
        square = torch.linalg.vector_norm(delta, dim=layout.last, keepdim=True).square() / count
        return Finished(delta, self.step_mult * (square + STEP_EPS).rsqrt())


class Celo2Base(Celo2):
    """Celo2's MLP for every parameter, not orthogonalised: `p <- p - step_mult u`, u scaled to rms 1.

    The ablation of the paper, and the cheaper choice where no matrix product per step can be afforded.

    Args:
        hidden, step_mult, seed: as for `Celo2`.
    """

    name = "celo2_base"
    quick_config: ClassVar = {"step_mult": 0.2}
    orthogonalizes = False

    def __init__(self, hidden: int = 8, step_mult: float = 1e-3, seed: int = 0) -> None:
        super().__init__(hidden, step_mult, route=False, seed=seed)
