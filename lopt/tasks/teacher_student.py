"""A student network learns what a random teacher network of another width says.

Source: the setting of Saad & Solla 1995, doi 10.1103/PhysRevE.52.4225 (online learning, fresh examples in every batch).
Differs from the source: both layers are learned, the depth is free, and so is the activation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.mlp import ACTIVATIONS, build_mlp, check_network
from lopt.tasks.module import draw_weights

WHOLE = 1024
"""Examples that stand for a whole split, of which there are infinitely many."""


class TeacherStudent(TaskFamily):
    """Regression on y = teacher(x), x standard normal; mean squared error.

    A task is its teacher's weights by layer, "0" and on, `[fan_out, fan_in]` from N(0, 1 / fan-in), without biases; the
    parameters are the student's, as torch initialises them. Mini-batches are x `[T, batch_size, inputs]` and y
    `[T, batch_size, 1]`, other draws in each split, of which `WHOLE` stand for all. A metric is the share of the
    teacher's mean square that the student leaves "unexplained". A student at least as wide and as deep can reach 0; an
    output of 0 has a loss of 0.22 in the mean over tasks. By default 1,633 parameters.

    Args:
        inputs: dimensions of x.
        width: units of every hidden layer of the student.
        teacher_width: units of every hidden layer of the teacher.
        depth: number of hidden layers of both.
        activation: of both, one of `ACTIVATIONS`.
        batch_size: examples per batch, always fresh.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range or unknown.
    """

    name = "teacher_student"
    examples = ("x", "y")

    def __init__(
        self,
        inputs: int = 16,
        width: int = 32,
        teacher_width: int = 8,
        depth: int = 2,
        activation: str = "tanh",
        batch_size: int = 64,
        horizon: int = 200,
    ) -> None:
        check_network(width, depth, activation)
        if min(inputs, teacher_width, batch_size) < 1:
            sizes = f"{inputs}, {teacher_width} and {batch_size}"
            raise ValueError(f"inputs, teacher_width and batch_size must be at least 1, got {sizes}")
        self.inputs, self.batch_size, self.horizon = inputs, batch_size, horizon
        self.student_widths = [inputs, *[width] * depth, 1]
        self.teacher_widths = [inputs, *[teacher_width] * depth, 1]
        self.activation = ACTIVATIONS[activation]()
        self.module = self._build()

    def _build(self) -> nn.Module:
        return build_mlp(self.student_widths, str(self.config["activation"]))

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        return {
            str(layer): torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float32) / fan_in**0.5
            for layer, (fan_in, fan_out) in enumerate(pairwise(self.teacher_widths))
        }

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(self._build, generator)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        split_seeds = branch_seeds(seeds, SPLITS.index(choose("split", split, SPLITS)))
        x = draw_normal(split_seeds, self.batch_size * self.inputs).float().view(-1, self.batch_size, self.inputs)
        return {"x": x, "y": self._teach(tasks, x)}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        seed = derive_seeds(0, "teacher_student", SPLITS.index(choose("split", split, SPLITS))).to(tasks["0"].device)
        x = draw_normal(seed, WHOLE * self.inputs).float().view(WHOLE, self.inputs).expand(count, -1, -1)
        return {"x": x, "y": self._teach(tasks, x)}

    def _teach(self, tasks: Task, x: Tensor) -> Tensor:
        """What the teachers say, `[T, B, 1]`."""
        for layer in range(len(tasks)):
            x = self.activation(x) if layer else x
            x = x @ tasks[str(layer)].transpose(1, 2)
        return x

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return F.mse_loss(functional_call(self.module, params, (batch["x"],)), batch["y"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return {"unexplained": self.loss(params, batch) / batch["y"].square().mean()}
