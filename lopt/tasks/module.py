"""Any `torch.nn.Module` with a loss and a data set as a task.

family = ModuleTask(lambda: nn.Linear(64, 10), F.cross_entropy, (images, labels), batch_size=32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset

from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, check_split
from lopt.tensors import Params, derive_seeds, draw_indices, make_generator

Data = tuple[Tensor, Tensor]


class ModuleTask(TaskFamily):
    """Supervised learning with a user's module; tasks differ in their initial weights and their batches.

    Args:
        build: makes the module; its weights are drawn from a seeded generator, torch's global one is restored.
        loss: `loss(output, target) -> scalar`, for one batch.
        data: `(inputs [n, ...], targets [n, ...])`, a map-style `Dataset` of such pairs (read into memory once),
            or a mapping of split names (`SPLITS`) to either. A single set is divided by `seed`: 80 % train and
            the rest shared equally by inner_valid, outer_valid and test.
        batch_size: examples per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        seed: of the division into splits.
    """

    name = "module"

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        data: Data | Dataset[Any] | Mapping[str, Data | Dataset[Any]],
        batch_size: int = 128,
        horizon: int = 100,
        seed: int = 0,
        **config: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, horizon=horizon, seed=seed, **config)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.build, self.loss_fn, self.batch_size, self.horizon = build, loss, batch_size, horizon
        if isinstance(data, Mapping):
            self.data = {check_split(split): _as_tensors(part) for split, part in data.items()}
            if "train" not in self.data:
                raise ValueError(f"data has splits {sorted(self.data)} but no 'train'")
        else:
            self.data = _divide(_as_tensors(data), seed)
        self.module = self._build_seeded(0)
        if any(True for _ in self.module.buffers()):
            names = [name for name, _ in self.module.named_buffers()]
            raise ValueError(f"modules with buffers are not supported (stateful layers): {names}")

    def _build_seeded(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def init(self, task: Task, generator: torch.Generator) -> Params:
        """The weights of a freshly built module."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return {k: p.detach() for k, p in self._build_seeded(seed).named_parameters()}

    def _split(self, split: str) -> Data:
        if check_split(split) not in self.data:
            raise ValueError(f"data has no split {split!r}, only {sorted(self.data)}")
        return self.data[split]

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """Inputs `[T, batch_size, ...]` and targets `[T, batch_size, ...]`."""
        x, y = self._split(split)
        index = draw_indices(seeds, self.batch_size, len(x))
        return {"x": x[index], "y": y[index]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        """All of a split, expanded without copying."""
        x, y = self._split(split)
        return {"x": x.expand(count, *x.shape), "y": y.expand(count, *y.shape)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The user's loss on the module's output."""
        return self.loss_fn(functional_call(self.module, params, (batch["x"],)), batch["y"])

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        """Accuracy, where the targets are classes."""
        if batch["y"].is_floating_point():
            return {}
        output = functional_call(self.module, params, (batch["x"],))
        return {"accuracy": (output.argmax(-1) == batch["y"]).float().mean()}


def _as_tensors(data: Data | Dataset[Any]) -> Data:
    """Inputs and targets of equal length, reading a `Dataset` once."""
    if isinstance(data, tuple):
        x, y = data
    else:
        pairs = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        x = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
        y = torch.stack([torch.as_tensor(pair[1]) for pair in pairs])
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"data needs as many inputs as targets, got {len(x)} and {len(y)}")
    return x, y


def _divide(data: Data, seed: int) -> dict[str, Data]:
    """80 % train, the rest in three equal parts, by a seeded permutation."""
    x, y = data
    rest = len(x) // 15
    if rest == 0:
        raise ValueError(f"{len(x)} examples are too few for four splits (15 at least)")
    order = torch.randperm(len(x), generator=make_generator(derive_seeds(seed, "splits")))
    sizes = [len(x) - 3 * rest, rest, rest, rest]
    return {s: (x[i], y[i]) for s, i in zip(SPLITS, torch.split(order, sizes), strict=True)}
