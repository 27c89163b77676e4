"""The recurrent schedulers of VeLO and Celo: one LSTM row per tensor, rows mixed by a maximum.

Source: Metz et al. 2022, arXiv 2211.09760 ("HyperV2"); Moudgil et al. 2025, arXiv 2501.12670 (Celo).
Differs from the sources: a first mixing layer whose output they discard is left out; the learned initial state is
taken at step 0 instead of being stored, so that it is trained as any other meta-weight.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from lopt.core.random import draw_truncated_normal, make_generator
from lopt.rules.building_blocks import features
from lopt.rules.stages import Accumulators, Clock

MAX_WIDTH = 4096  # a foreign file must not make us allocate gigabytes before its shapes are compared
LOSS_KEYS = ("loss_mean", "loss_min", "loss_count")
ROW_KEYS = (*LOSS_KEYS, "lstm_h", "lstm_c")
NUM_FEATURES = len(features.PROGRESS_CENTERS) + features.NUM_LOSS_FEATURES
FEATURE_NAMES = (
    *(f"tanh(10 (t/T - {center}))" for center in features.PROGRESS_CENTERS),
    *(f"loss against its minimum, average {i + 1}" for i in range(features.NUM_LOSS_FEATURES)),
)


class Scheduler(nn.Module):
    """`x = W_skip z + max over rows of relu(W_mix z)`, an LSTM with forget bias 1, and linear heads.

    Args:
        num_extra: inputs beside the nine progress and nine loss features.
        width: of the mixing layers and the LSTM.
        heads: width of each linear readout, by name.
        seed: of the initial meta-weights: normal, std 1/sqrt(fan_in), cut at two of them; biases 0.
    """

    def __init__(self, num_extra: int, width: int, heads: dict[str, int], seed: int) -> None:
        super().__init__()
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"the scheduler's width must be from 1 to {MAX_WIDTH}, got {width}")
        self.width = width
        generator = make_generator(seed)
        inputs = NUM_FEATURES + num_extra
        sizes = {"mix": (width, inputs), "skip": (width, inputs), "lstm": (4 * width, 2 * width)}
        for name, (rows, cols) in (sizes | {name: (rows, width) for name, rows in heads.items()}).items():
            weight = draw_truncated_normal((rows, cols), 1 / sqrt(cols), generator)
            self.register_parameter(f"w_{name}", nn.Parameter(weight))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.zeros(rows, dtype=torch.float32)))
        self.h0 = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.c0 = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("centers", torch.tensor(features.PROGRESS_CENTERS, dtype=torch.float32), persistent=False)

    def start(self, batch: tuple[int, ...], like: Tensor) -> Accumulators:
        """A tensor's row before the first step: the loss buffer and the LSTM's vectors.

        Args:
            like: gives dtype and device.
        Returns:
            Tensors `[*batch, features]` under the names of `ROW_KEYS`, which a rule declares as `tensor_keys`.
        """
        vectors = {key: like.new_zeros(*batch, self.width) for key in ("lstm_h", "lstm_c")}
        return features.start_loss_buffer(batch, like) | vectors

    def observe(
        self, rows: Accumulators, loss: Tensor | None, clock: Clock, span: Tensor
    ) -> tuple[Tensor, Accumulators]:
        """Progress and loss features `[*batch, n, 18]`, and the rows with the new loss buffer.

        Args:
            span: the steps that the slowest average of the loss spans, `[*batch, 1 or n]`.
        """
        mean = rows["loss_mean"]
        decays = features.loss_decays(span, mean.dtype)
        buffer = features.update_loss_buffer({key: rows[key] for key in LOSS_KEYS}, loss, decays)
        progress = clock.progress(mean.dtype)
        assert progress is not None, "step_tensors has seen to it"
        shares = features.progress_features(progress, self.centers).expand(*mean.shape[:-1], -1)  # type: ignore[arg-type]
        return torch.cat([shares, features.loss_features(buffer, decays)], -1), rows | buffer

    def advance(self, z: Tensor, rows: Accumulators, step: Tensor) -> tuple[Tensor, Accumulators]:
        """One step of the LSTM on inputs `[*batch, n, inputs]`: the output `[*batch, n, width]` and the new rows."""
        # Tensors meet in this maximum alone, which does not depend on their order.
        x = self.read("skip", z) + self.read("mix", z).relu().amax(-2, keepdim=True)
        # The learned initial state counts at step 0, so that it is trained as any other weight.
        first = (step == 0)[..., None]
        h = torch.where(first, self.h0[..., None, :], rows["lstm_h"])
        c = torch.where(first, self.c0[..., None, :], rows["lstm_c"])
        # The order of gates is the source's, and the forget gate has a bias of 1.
        i, g, f, o = self.read("lstm", torch.cat([x, h], -1)).chunk(4, -1)
        c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, rows | {"lstm_h": h, "lstm_c": c}

    def read(self, name: str, x: Tensor) -> Tensor:
        """The linear layer `name`: `[*batch, n, in]` -> `[*batch, n, out]`."""
        weight, bias = getattr(self, f"w_{name}"), getattr(self, f"b_{name}")
        product: Tensor = x @ weight.mT + bias[..., None, :]
        return product
