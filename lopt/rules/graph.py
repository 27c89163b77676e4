"""small_fc whose tensors hear of each other: messages along the order of the layers say what each one's MLP does.

Where VeLO has an LSTM row for each tensor that meets the others in one maximum, a row here meets its neighbours, so
that a rule can tell the first layer from the last and a tensor between large gradients from one between small ones.

Source: ours; message passing as in Gilmer et al. 2017, arXiv 1704.01212, on the chain of a model's parameters.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from lopt.core.random import derive_seeds, make_generator
from lopt.rules.building_blocks.products import Layer
from lopt.rules.layout import Layout
from lopt.rules.small_fc import SmallFC
from lopt.rules.stages import PLACE, Accumulators, AllTensors, Elements, Means, Sum, Visit

MAX_WIDTH, MAX_ROUNDS = 256, 8  # a foreign file must not make us allocate gigabytes
TINY = 1e-16
LIMIT = 5.0  # of features, and of what a row says
ROW_FEATURES = (
    *("log rms g, less its mean over tensors", "log rms m 0.9, less that of g", "log rms p"),
    *("log size", "dimensions > 1", "place in the model, 0 to 1"),
)


class Graph(SmallFC):
    """`p <- p - step_mult exp(s) d exp(exp_mult a)` with small_fc's MLP, to whose first layer a row's `b` is added.

    A row begins as `relu(W z)` of the `ROW_FEATURES` z of its tensor; in each round it becomes
    `h + tanh(W_own h + W_before h_before + W_after h_after)`, with 0 beyond the ends of the model. s and b are read
    from it, by weights that start at 0: until it is trained, the rule is `small_fc`. Scale of gradients: as small_fc.
    State: small_fc's and one number for each tensor, its place.

    Args:
        hidden, hidden_layers, exp_mult, step_mult: see `SmallFC`.
        width: of the rows.
        rounds: of messages; a tensor hears of those that are so many places away.
        seed: of the initial meta-weights.
    """

    name = "graph"
    tensor_keys = (PLACE,)
    quick_config: ClassVar = {"hidden": 8, "step_mult": 0.1, "width": 4}
    feature_names = (*SmallFC.feature_names, *ROW_FEATURES)

    def __init__(
        self,
        hidden: int = 32,
        hidden_layers: int = 1,
        exp_mult: float = 1e-3,
        step_mult: float = 1e-3,
        width: int = 16,
        rounds: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(hidden, hidden_layers, exp_mult, step_mult, seed)
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"width must be from 1 to {MAX_WIDTH}, got {width}")
        if not 0 <= rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be from 0 to {MAX_ROUNDS}, got {rounds}")
        self.rounds = rounds
        generator = make_generator(derive_seeds(seed, "graph"))
        sizes = {"row": (width, len(ROW_FEATURES))}
        for i in range(rounds):
            sizes |= {f"own{i}": (width, width), f"before{i}": (width, width), f"after{i}": (width, width)}
        for name, (rows, columns) in sizes.items():
            weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32) / sqrt(columns)
            self.register_parameter(f"w_{name}", nn.Parameter(weight))
        self.b_row = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.w_say = nn.Parameter(torch.zeros(1 + hidden, width, dtype=torch.float32))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return super().init_accumulators(p, layout) | {PLACE: p.new_zeros(*p.shape[: p.ndim - layout.ndim], 1)}

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        axes, g = e.layout.axes, self.clip(e.g)
        m = e.acc["m"].narrow(-e.layout.ndim - 1, 0, 1).squeeze(-e.layout.ndim - 1)
        sums = {key: Sum(x.square().sum(axes, keepdim=True), axes) for key, x in (("g2", g), ("m2", m), ("p2", e.p))}
        return Visit(sums={**super().measure(e).sums, **sums})

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        place = tensors.tensor_state[PLACE][..., 0]  # [*batch, n]
        order = place.argsort(dim=-1, stable=True)
        z = self._describe(tensors, place)
        # Rows come grouped by the tensors' shapes; messages go along the model.
        h = _pick(self._read("row", z, self.b_row).relu(), order)
        edge = torch.zeros_like(h[..., :1, :])
        for i in range(self.rounds):
            before = torch.cat([edge, h[..., :-1, :]], -2)
            after = torch.cat([h[..., 1:, :], edge], -2)
            h = h + torch.tanh(
                self._read(f"own{i}", h) + self._read(f"before{i}", before) + self._read(f"after{i}", after)
            )
        said = _pick(self._read("say", h), order.argsort(dim=-1))
        return {PLACE: tensors.tensor_state[PLACE]}, {
            "log_gain": said[..., 0].clamp(-LIMIT, LIMIT),
            "shift": said[..., 1:],
        }

    def layers(self, shared: Means) -> list[Layer]:
        (weight, bias), *others = super().layers(shared)
        return [(weight, bias + shared["shift"]), *others]

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return self.step_mult * shared["log_gain"].exp()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _describe(self, tensors: AllTensors, place: Tensor) -> Tensor:
        """The `ROW_FEATURES` `[*batch, n, 6]`."""
        pairs = list(zip(tensors.means, tensors.layouts, strict=True))
        logs = {
            key: torch.cat([0.5 * (m[key].flatten(-x.ndim)[..., 0] + TINY).log() for m, x in pairs], -1)
            for key in ("g2", "m2", "p2")
        }
        shapes = [x.shape for m, x in pairs for _ in range(m["g2"].flatten(-x.ndim).shape[-2])]
        sizes = [[prod(s), sum(size > 1 for size in s)] for s in shapes]
        size, dims = _fill(sizes, place).unbind(-1)
        end = place.amax(-1, keepdim=True).clamp(min=1)
        columns = [
            logs["g2"] - logs["g2"].mean(-1, keepdim=True),
            logs["m2"] - logs["g2"],
            logs["p2"],
            (size.clamp(min=1).log() / 5).expand_as(place),
            dims.expand_as(place),
            place / end,
        ]
        return torch.stack(columns, -1).clamp(-LIMIT, LIMIT)

    def _read(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer `name`: `[*batch, n, in]` -> `[*batch, n, out]`."""
        product: Tensor = x @ getattr(self, f"w_{name}").mT
        return product if bias is None else product + bias[..., None, :]


def _pick(rows: Tensor, order: Tensor) -> Tensor:
    """Rows `[*batch, n, k]` in the order of indices `[*batch, n]`."""
    return rows.gather(-2, order[..., None].expand(*order.shape, rows.shape[-1]))


def _fill(rows: list[list[int]], like: Tensor) -> Tensor:
    """Numbers in the dtype of `like` and where it is, so that no copy makes the host wait for a device."""
    if like.device.type == "cpu":
        return like.new_tensor(rows)
    return torch.stack([torch.stack([like.new_full((), x) for x in row]) for row in rows])
