"""Few-shot classification: what families of such tasks have in common, whatever it is that is classified.

Source: Vinyals et al. 2016, arXiv 1606.04080 (N ways, K shots).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task, TaskFamily
from lopt.tasks.module import draw_weights

Self = TypeVar("Self", bound="FewShotClasses")


class FewShotClasses(TaskFamily):
    """Base of families whose tasks are a few classes, of each a few examples to learn from and others to be told.

    Mini-batches are x `[T, n, ...]` and classes y `[T, n]` int64, class by class: the train split is the support, all
    others the queries. Subclasses write `build_network`, `sample_all` and `batch`, and set `module`.

    Attributes:
        ways: classes of a task.
        shots: examples of each that are learned from.
        queries: other examples of each that a task is judged on.
        module: a network, for its form.
        pools: numbers of a pool's classes, as a range.
    """

    examples = ("x", "y")
    judged = "inner_valid"

    ways: int
    shots: int
    queries: int
    module: nn.Sequential
    pools: dict[str, range]

    @abstractmethod
    def build_network(self, ways: int | None = None) -> nn.Sequential:
        """The network, with torch's random weights; all but its last layer, "head", give the features of an example.

        Args:
            ways: classes that it tells apart, by default those of a task.
        """

    @abstractmethod
    def pick_examples(self, classes: Tensor, shares: Tensor) -> Tensor:
        """An example `[n, ...]` of each of some classes, for what is learned without tasks.

        Args:
            classes: numbers as in `pools`, int64 `[n]`.
            shares: in [0, 1), `[n]`: which of a class's examples, in their order.
        """

    def to(self: Self, device: torch.device | str) -> Self:
        self.module = self.module.to(device)
        return self

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(self.build_network, generator)

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        return self.batch(tasks, next(iter(tasks.values())), split)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(self.classify(params, batch["x"]), batch["y"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (self.classify(params, batch["x"]).argmax(-1) == batch["y"]).float().mean()}

    def classify(self, params: Params, x: Tensor) -> Tensor:
        """Logits `[n, ways]` of one task's examples `[n, ...]`."""
        logits: Tensor = functional_call(self.module, params, (x,))
        return logits

    def number_classes(self, count: int, examples: int, device: torch.device) -> Tensor:
        """The classes y of `examples` of each, class by class, for `count` tasks."""
        y = torch.arange(self.ways, device=device)[:, None]
        return y.expand(count, -1, examples).flatten(1)
