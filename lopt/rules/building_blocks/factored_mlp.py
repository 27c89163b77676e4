"""The features of small_fc_lopt and its descendants (VeLO, Celo, Celo2): momenta, second moments, factored moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lopt_kernels.feature_mlp.features import CLIP, LARGEST
from lopt_kernels.feature_mlp.fold import RMS_EPS
from torch import Tensor

from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.feature_mlp import FeatureMLP, Inputs
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Decision, Elements, Means, Visit

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
K = 3
CLIPS_NAMES = ("clip(g, 0.1)", "g rs")  # the features that small_fc_lopt does not have
FEATURE_NAMES = (
    *("g", "clip(g, 0.1)", "p"),
    *(f"m {decay}" for decay in MOMENTUM_DECAYS),
    "v",
    *(f"m {decay} rs" for decay in MOMENTUM_DECAYS),
    "rs = 1/sqrt(v)",
    *(f"g F {decay}" for decay in FACTORED_DECAYS),
    "g rs",
    *(f"row mean of g^2 {decay}" for decay in FACTORED_DECAYS),
    *(f"column mean of g^2 {decay}" for decay in FACTORED_DECAYS),
    *(f"1/sqrt(row mean) {decay}" for decay in FACTORED_DECAYS),
    *(f"1/sqrt(column mean) {decay}" for decay in FACTORED_DECAYS),
    *(f"m {momentum} F {decay}" for momentum, decay in zip(MOMENTUM_DECAYS, FACTORED_DECAYS, strict=True)),
)


class FactoredMLP(FeatureMLP):
    """Inputs, in this order (Celo's family has the ones in brackets):

    `g, [clip(g, 0.1)], p, m*3, v, m rs*3, rs, g F*3, [g rs], R*3, C*3, rsqrt(R)*3, rsqrt(C)*3, m F*3`

    with momenta m, second moment v, rs = 1/sqrt(v), row and column averages R, C of g^2 and F, which replaces 1/sqrt of
    the second moment by a row times a column factor. Vectors have one average V per decay for R, C and F. Differs from
    the source: where it does not clip gradients, they are clipped to +-1e7, so that their fourth powers stay finite.

    Attributes:
        clips: the family has the features in brackets, and clips gradients to +-1000.
        rs_eps: added to v in rs.
        vector_eps: added to V in the m F of vectors.
    """

    clips: bool = True
    line_keys = ("rows", "cols")
    square_keys = ("v", *line_keys)
    rs_eps: float = 1e-6
    vector_eps: float = 0.0
    second_decay: float = 0.999

    def __init__(self, widths: list[int], seed: int, bank: tuple[int, ...] = ()) -> None:
        super().__init__(widths, seed, bank)
        self.register_buffer("momentum_decays", torch.tensor(MOMENTUM_DECAYS, dtype=torch.float32), persistent=False)
        self.register_buffer("factored_decays", torch.tensor(FACTORED_DECAYS, dtype=torch.float32), persistent=False)
        self.register_buffer("second_decays", torch.tensor([self.second_decay], dtype=torch.float32), persistent=False)

    def decays(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decays `[3]`, `[1]`, `[3]` of momenta, second moment and factored moments; a batch may come first."""
        return self.momentum_decays, self.second_decays, self.factored_decays  # type: ignore[return-value]

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        start = {"m": features.start_averages(p, K, layout.ndim), "v": torch.zeros_like(p)}
        if layout.factored is None:
            return start | {"averages": features.start_averages(p, K, layout.ndim)}
        return start | features.start_lines(p, K, layout)

    def clip(self, g: Tensor) -> Tensor:
        """The gradient that everything is computed from."""
        bound = CLIP if self.clips else LARGEST
        return g.clamp(-bound, bound)

    def parameter_rms(self, mean_squares: Tensor) -> Tensor:
        """`sqrt(mean p^2 + 1e-9)` `[*batch]`, from the element features' mean squares."""
        return (mean_squares[..., 2 if self.clips else 1] + RMS_EPS).sqrt()

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        if e.layout.factored is None:
            return Visit()
        return Visit(sums=features.sum_lines(self.clip(e.g), e.layout))

    def begin_step(self, clock: Clock) -> Means:
        # Once per step: learned decays are functions of meta-weights, and elements may come in many chunks.
        decays = zip(("momentum_decays", "second_decays", "factored_decays"), self.decays(), strict=True)
        return super().begin_step(clock) | dict(decays)

    def update_lines(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, shared: Means) -> Decision:
        if layout.factored is None:
            return Decision()
        decays = features.spread(shared["factored_decays"], layout.ndim)
        lines = {key: features.average(acc[key], means[key], decays) for key in ("rows", "cols")}
        return Decision(lines, features.scale_lines(lines["rows"], lines["cols"], layout))

    def update_state(self, e: Elements, shared: Means) -> Visit:
        # Decays may be meta-weights with batch dimensions, and come ready from `begin_step`.
        ndim, g = e.layout.ndim, self.clip(e.g)
        momentum, second, factored = (
            features.spread(shared[f"{key}_decays"], ndim) for key in ("momentum", "second", "factored")
        )
        square, lifted = g.square(), features.lift(g, ndim)
        acc = {
            "m": features.average(e.acc["m"], lifted, momentum),
            "v": features.average(e.acc["v"], square, second.squeeze(-ndim - 1)),
        }
        if e.layout.factored is None:
            acc["averages"] = features.average(e.acc["averages"], features.lift(square + 1e-30, ndim), factored)
        # Features are of the new accumulators; their sums of squares need a pass of their own before `move` can scale.
        new = e._replace(acc={**e.acc, **acc})
        axes = self.norm_axes(e.layout)
        joined, fields = self.join_features(new)
        return Visit(acc, {"squares": features.sum_squares([joined], axes, e)}, fields=fields)

    # -- features ------------------------------------------------------------------------------------------------------

    def element_features(self, e: Elements) -> list[features.Piece]:
        ndim = e.layout.ndim
        g, p, v = (features.lift(x, ndim) for x in (self.clip(e.g), e.p, e.acc["v"]))
        m, rs = e.acc["m"], (v + self.rs_eps).rsqrt()
        element_pieces: list[features.Piece]
        line_pieces: list[features.Piece] = []
        if e.layout.factored is None:  # a vector's averages are its elements' own, and both rows and columns
            averages = e.acc["averages"]
            line_pieces = [averages, averages, *2 * [(averages + 1e-8).rsqrt()]]
            factor, factor_m = (averages + 1e-9).rsqrt(), (averages + self.vector_eps).rsqrt()
        else:
            factor = factor_m = e.acc["row_scale"] * e.acc["col_scale"]
        if self.clips:
            element_pieces = [g, g.clamp(-0.1, 0.1), p, m, v, (m, rs), rs, (g, factor), (g, rs)]
        else:
            element_pieces = [g, p, m, v, (m, rs), rs, (g, factor)]
        return [*element_pieces, *line_pieces, (m, factor_m)]

    def line_features(self, acc: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        if layout.factored is None:
            return {}
        # The source adds another eps in each root: 1e-8 in these features, 1e-9 in F, `rs_eps` in rs.
        return {key: torch.cat([acc[key], (acc[key] + 1e-8).rsqrt()], -layout.ndim - 1) for key in self.line_keys}

    def find_inputs(self, layout: Layout) -> Inputs:
        start = 15 if self.clips else 13
        rows, cols, rs_rows, rs_cols, last = (slice(start + K * i, start + K * (i + 1)) for i in range(5))
        if layout.factored is None:
            return Inputs([slice(last.stop)], {}, slice(last.stop, None))
        lines = {"rows": [rows, rs_rows], "cols": [cols, rs_cols]}
        return Inputs([slice(start), last], lines, slice(last.stop, None))
