"""Families for the tests of tasks, and how tasks are drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import Params, stack_trees
from lopt.tasks import TASKS, Batch, ModuleTask, RandomScaling, Task, TaskFamily
from lopt.tasks.base import ExactTask


def make_module_task(**options: object) -> ModuleTask:
    x = torch.randn(90, 5, generator=make_generator(0), dtype=torch.float32)
    data = (x, x.sum(1, keepdim=True))
    return ModuleTask(lambda: nn.Linear(5, 1), F.mse_loss, data, batch_size=16, **options)  # type: ignore[arg-type]


def make_classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(60, 3, generator=make_generator(1), dtype=torch.float32)
    return x, (x.sum(1) > 0).long()


class Scaled(nn.Module):
    """A layer and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class Waves(ExactTask):
    """A task is no tensors at all: all have the same loss."""

    name = "waves"

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": torch.randn(4, generator=generator, dtype=torch.float32)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return (params["x"].square() + params["x"].sin()).sum()


FAMILIES = {
    **{name: cls for name, cls in TASKS.items() if name != "module"},
    "module": make_module_task,
    "module with a scalar parameter": lambda: ModuleTask(Scaled, F.cross_entropy, make_classes(), batch_size=8),
    "without tensors": Waves,
    "uniform quadratic": lambda: TASKS["quadratic"](distribution="uniform"),
    "deep relu mlp": lambda: TASKS["mlp"](depth=2, activation="relu"),
    "conv on patches": lambda: TASKS["conv"](data="patches", batch_size=8),
    "vae of patches": lambda: TASKS["vae"](data="patches", depth=2, batch_size=8),
    "regression": lambda: TASKS["tabular"](data="diabetes"),
    "vanilla rnn": lambda: TASKS["char_rnn"](cell="vanilla", width=8, batch_size=4),
    "lstm": lambda: TASKS["char_rnn"](cell="lstm", width=8, batch_size=4),
    "deep transformer": lambda: TASKS["char_transformer"](depth=2, width=8, length=8, batch_size=4),
    "sine network": lambda: TASKS["coordinate_mlp"](encoding="sine", frequency=10.0),
    "reacher": lambda: TASKS["mujoco"](system="reacher", width=3, length=5),
    "perceptron on glyphs": lambda: TASKS["glyphs"](ways=3, queries=2, network="mlp", width=4, size=8),
    "scaled mlp": lambda: RandomScaling(TASKS["mlp"](width=3, batch_size=8), 1.0, "tensor"),
    "scaled": lambda: RandomScaling(TASKS["quadratic"](), 3.0),
}


def build(make: Callable[[], TaskFamily]) -> TaskFamily:
    """The family; a test of one whose data come with a package that is not installed is skipped."""
    try:
        return make()
    except ImportError as error:
        pytest.skip(str(error))


def draw_tasks(family: TaskFamily, count: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    tasks, params = [], []
    for i in range(count):
        tasks.append(family.sample(make_generator(10 + i)))
        params.append(family.init(tasks[-1], make_generator(20 + i)))
    drifted = family.drift(stack_trees(tasks), torch.zeros(count, dtype=torch.int64))
    return drifted, stack_trees(params), family.batch(drifted, derive_seeds(0, "batch", torch.arange(count)))
