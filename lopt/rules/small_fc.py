"""small_fc_lopt: a tiny MLP on Adafactor-style features, the workhorse of the field.

Source: Metz et al. 2022, arXiv 2203.11860, "AdafacMLPLOpt" in learned_optimization.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.factored_mlp import CLIPS_NAMES, FactoredMLP, K
from lopt.rules.building_blocks.factored_mlp import FEATURE_NAMES as FAMILY_NAMES
from lopt.rules.building_blocks.feature_mlp import repeat_width
from lopt.rules.stages import Clock, Means

FEATURE_NAMES = (*(name for name in FAMILY_NAMES if name not in CLIPS_NAMES), *features.TIME_NAMES)


class SmallFC(FactoredMLP):
    """39 inputs, `hidden_layers` hidden layers, two outputs (d, a): `p <- p - step_mult d exp(exp_mult a)`.

    The default choice for training a rule of one's own. The decays are meta-weights, as offsets from their initial
    values. State: four numbers per parameter, and six for each row and column (vectors: seven per parameter).

    Args:
        hidden: width of the hidden layers (4 in the source, 32 in PyLO).
        hidden_layers: number of hidden layers.
        exp_mult, step_mult: see above (both 0.001 in the source; PyLO has step_mult 0.01).
        seed: of the initial meta-weights.
    """

    name = "small_fc"
    quick_config: ClassVar = {"hidden": 8, "step_mult": 0.1}
    feature_names = FEATURE_NAMES
    clips = False
    vector_eps = 1e-6

    def __init__(
        self,
        hidden: int = 32,
        hidden_layers: int = 1,
        exp_mult: float = 1e-3,
        step_mult: float = 1e-3,
        seed: int = 0,
    ) -> None:
        widths = [len(FEATURE_NAMES), *repeat_width(hidden, hidden_layers), 2]
        super().__init__(widths, seed)
        self.exp_mult, self.step_mult = exp_mult, step_mult
        self.momentum_offsets = nn.Parameter(torch.zeros(K, dtype=torch.float32))
        self.second_offsets = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.factored_offsets = nn.Parameter(torch.zeros(K, dtype=torch.float32))
        self.register_buffer("time_scales", torch.tensor(features.TIME_SCALES, dtype=torch.float32), persistent=False)

    def decays(self) -> tuple[Tensor, Tensor, Tensor]:
        momentum, second, factored = super().decays()
        return (
            features.learned_decays(self.momentum_offsets, momentum),
            features.learned_decays(self.second_offsets, second).clamp(0, 1),
            features.learned_decays(self.factored_offsets, factored).clamp(0, 1),
        )

    def constant_features(self, clock: Clock) -> Tensor:
        return features.time_features(clock.step, self.time_scales)  # type: ignore[arg-type]

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return mean_squares.new_full(mean_squares.shape[:-1], self.step_mult)
