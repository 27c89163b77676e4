"""MLPLOpt: an MLP on the gradient, the parameter and six momenta; no second moments at all.

Source: "MLPLOpt" (LOLv2) in learned_optimization, Metz et al. 2022, arXiv 2203.11860.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.feature_mlp import FeatureMLP, Inputs, repeat_width
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Elements, Means, Visit

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_OWN = 2 + len(DECAYS)


class MLPLOpt(FeatureMLP):
    """Inputs g, p, m*6 and eleven time features; `p <- p - step_mult d exp(exp_mult a)`.

    An ablation of small_fc: without second moments, steps follow the scale of features normalised per tensor. State:
    six momenta per parameter.

    Args:
        hidden: width of the hidden layers.
        hidden_layers: number of hidden layers.
        exp_mult, step_mult: see above.
        seed: of the initial meta-weights.
    """

    name = "mlp"
    quick_config: ClassVar = {"hidden": 8, "step_mult": 0.1}
    feature_names = ("g", "p", *(f"m {decay}" for decay in DECAYS), *features.TIME_NAMES)

    def __init__(
        self,
        hidden: int = 32,
        hidden_layers: int = 2,
        exp_mult: float = 1e-3,
        step_mult: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__([len(self.feature_names), *repeat_width(hidden, hidden_layers), 2], seed)
        self.exp_mult, self.step_mult = exp_mult, step_mult
        self.register_buffer("decays", torch.tensor(DECAYS, dtype=torch.float32), persistent=False)
        self.register_buffer("time_scales", torch.tensor(features.TIME_SCALES, dtype=torch.float32), persistent=False)

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {"m": features.start_averages(p, len(DECAYS), layout.ndim)}

    def update_state(self, e: Elements, shared: Means) -> Visit:
        decays = features.spread(self.decays, e.layout.ndim)  # type: ignore[arg-type]
        acc = {"m": features.average(e.acc["m"], features.lift(e.g, e.layout.ndim), decays)}
        joined, fields = self.join_features(e._replace(acc=acc))
        return Visit(acc, {"squares": features.sum_squares([joined], e.layout.axes, e)}, fields=fields)

    def element_features(self, e: Elements) -> list[features.Piece]:
        return [features.lift(e.g, e.layout.ndim), features.lift(e.p, e.layout.ndim), e.acc["m"]]

    def constant_features(self, clock: Clock) -> Tensor:
        return features.time_features(clock.step, self.time_scales)  # type: ignore[arg-type]

    def find_inputs(self, layout: Layout) -> Inputs:
        return Inputs([slice(NUM_OWN)], {}, slice(NUM_OWN, None))

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return mean_squares.new_full(mean_squares.shape[:-1], self.step_mult)
