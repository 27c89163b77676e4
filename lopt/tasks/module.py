"""Any `torch.nn.Module` with a loss and a data set as a task: the shortest way to meta-train on a problem of one's own.

family = ModuleTask(lambda: nn.Linear(64, 10), F.cross_entropy, (images, labels), batch_size=32)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.data import Dataset

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_indices, make_generator
from lopt.core.tensors import Params, stack_trees
from lopt.tasks.base import SPLITS, Batch, Data, Task, TaskFamily
from lopt.tasks.batched import batch_losses

Module = TypeVar("Module", bound="ModuleTask")
RawData = tuple[Any, Any] | Dataset[Any]

ADVICE = {
    r"randomness": "it draws random numbers; set dropout to p=0 or call eval() on the module",
    r"Batching rule": "nn.RNN, nn.GRU and nn.LSTM cannot be batched over tasks; write the cell with nn.Linear",
    r"data-dependent|dynamic shape|numpy\(\)": "its steps depend on values; use torch.where, not `if`, item() or numpy",
    r"in-place|broadcast shape": "it writes into a tensor; make a new one instead",
    r"to return a (scalar )?Tensor": "loss must return a scalar tensor, one number per batch",
    r"dtype|scalar type|should be the same": "make the data float32 like the module, class targets int64",
}
"""What to do about a failure, by a pattern of torch's message; the first one that fits is given."""


class ModuleTask(TaskFamily, unrecorded=("build", "loss", "data")):
    """Supervised learning with a user's module; tasks differ in their initial weights and their batches.

    Parameters that require gradients (all float32) are learned. Frozen ones and constant buffers are those of one
    build, the same for all tasks. Module and loss are batched over tasks with `torch.func.vmap`: they must not draw
    random numbers (dropout), change buffers (batch normalisation's running statistics), branch on values or use fused
    recurrent layers. One step of two tasks is tried at once to find out.

    Mini-batches are inputs x and targets y, `[T, batch_size, ...]`. Where targets are integers and outputs
    `[..., classes]`, a metric is the accuracy. Subclasses record the arguments of their own constructors as `config`.

    Args:
        build: makes the module; its weights are drawn from a seeded generator, torch's global one is restored.
        loss: `loss(output, target) -> scalar`, for one batch.
        data: `(inputs [n, ...], targets [n, ...])` as tensors or arrays, a map-style `Dataset` of such pairs (read
            into memory once), or a mapping of split names (`SPLITS`) to either. A single set is divided by `seed`:
            80 % train and the rest shared equally by inner_valid, outer_valid and test.
        batch_size: examples per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        seed: of the division into splits.
        config: further names and values for `config`, by which descriptions tell this family from others.
    Raises:
        ValueError: the data cannot be divided, or the module cannot be trained on many tasks at once.

    Attributes:
        data: inputs and targets by split.
        module: one build, with the frozen parameters and the buffers of all tasks.
        batched: the losses of many tasks as matrix products, for plain networks; None where `vmap` computes them.
    """

    name = "module"
    examples: tuple[str, ...] = ("x", "y")

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        data: RawData | Mapping[str, RawData],
        batch_size: int = 128,
        horizon: int = 100,
        seed: int = 0,
        **config: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.build, self.loss_fn, self.batch_size, self.horizon = build, loss, batch_size, horizon
        if isinstance(data, Mapping):
            self.data = {choose("data's split", split, SPLITS): _as_tensors(pairs) for split, pairs in data.items()}
            if "train" not in self.data:
                raise ValueError(f"data has splits {sorted(self.data)} but no 'train'")
        else:
            self.data = _divide(_as_tensors(data), seed)
        self.module = _build_seeded(build, 0)
        # Negative classes are those that cross-entropy leaves out, which the batched form does not know.
        whole = all(y.is_floating_point() or bool((y >= 0).all()) for _, y in self.data.values())
        self.batched = batch_losses(self.module, loss) if whole else None
        self._try_step()

    def to(self: Module, device: torch.device | str) -> Module:
        self.data = {split: (x.to(device), y.to(device)) for split, (x, y) in self.data.items()}
        self.module = self.module.to(device)
        return self

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(self.build, generator)

    def _try_step(self) -> None:
        """What one step and one evaluation of two tasks compute, so that what they cannot is refused here."""
        weights = _trainable(self.module)
        if {p.dtype for p in weights.values()} != {torch.float32}:
            dtypes = {k: p.dtype for k, p in weights.items()} or "none"
            raise ValueError(f"{type(self.module).__name__} needs trainable parameters, all float32, and has {dtypes}")
        # Training computes loss and gradient, evaluation the loss alone. The generator is forked, as a module may draw
        # numbers before it is refused.
        tasks = stack_trees([self.sample(make_generator(0))] * 2)
        batch = self.batch(tasks, derive_seeds(0, "trial", torch.arange(2)))
        with torch.random.fork_rng(devices=[]), _explain_failure(batch):
            changed = _find_changed_buffers(self.module, batch["x"][0])
            if not changed:
                params = {k: p.expand(2, *p.shape) for k, p in weights.items()}
                vmap(grad_and_value(self.loss))(params, batch)
                vmap(self.loss)(params, batch)
        if changed:
            raise ValueError(f"forward changes the buffers {changed} (batch norm: set track_running_stats=False)")

    def _split(self, split: str) -> Data:
        if choose("split", split, SPLITS) not in self.data:
            raise ValueError(f"data has no split {split!r}, only {sorted(self.data)}")
        return self.data[split]

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        x, y = self._split(split)
        index = draw_indices(seeds, self.batch_size, len(x))
        return {"x": x[index], "y": y[index]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        x, y = self._split(split)
        return {"x": x.expand(count, *x.shape), "y": y.expand(count, *y.shape)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.loss_fn(functional_call(self.module, params, (batch["x"],)), batch["y"])

    def losses(self, params: Params, batch: Batch) -> Tensor:
        if self.batched is None or type(self).loss is not ModuleTask.loss:
            return super().losses(params, batch)
        x, y = batch["x"], batch["y"]
        plain = x.ndim == 3 and y.ndim == (3 if y.is_floating_point() else 2)
        return self.batched(params, x, y) if plain else super().losses(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        y = batch["y"]
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            return {}
        output = functional_call(self.module, params, (batch["x"],))
        if not isinstance(output, Tensor) or output.shape[:-1] != y.shape or output.shape[-1] < 2:
            return {}
        return {"accuracy": (output.argmax(-1) == y).float().mean()}


def draw_weights(build: Callable[[], nn.Module], generator: torch.Generator) -> Params:
    """The trainable weights of a freshly built module, as a family's `init` draws them.

    Args:
        build: makes the module with torch's global generator, which is seeded for it and then left as it was.
        generator: of the task; one number is drawn.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return _trainable(_build_seeded(build, seed))


def _build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` first asks all kinds of devices
        return build()


def _trainable(module: nn.Module) -> Params:
    """The parameters that require gradients, detached."""
    return {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}


def _find_changed_buffers(module: nn.Module, x: Tensor) -> list[str]:
    """Names of the buffers that a forward pass changes."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if before:
        with torch.no_grad():
            module(x)
    after = dict(module.named_buffers())
    return [name for name, buffer in before.items() if not torch.equal(buffer, after[name])]


@contextmanager
def _explain_failure(batch: Batch) -> Iterator[None]:
    """Turn any error of a user's module or loss into a ValueError that says what was found and what to do."""
    try:
        yield
    except Exception as error:
        fitting = (advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error)))
        advice = next(fitting, "it must run under torch.func.vmap and grad")
        shapes = ", ".join(f"{k} {v.dtype} {list(v.shape[1:])}" for k, v in batch.items())
        raise ValueError(
            f"module and loss fail on batches of two tasks: {advice} (found {shapes}; "
            f"{type(error).__name__}: {str(error)[:200]})"
        ) from error


def _as_tensors(data: RawData) -> Data:
    """Inputs and targets of equal length, reading a `Dataset` once."""
    if isinstance(data, tuple):
        x, y = map(torch.as_tensor, data)
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
    held_out = len(x) // 15
    if held_out == 0:
        raise ValueError(f"{len(x)} examples are too few for four splits (15 at least)")
    order = torch.randperm(len(x), generator=make_generator(derive_seeds(seed, "splits")))
    sizes = [len(x) - 3 * held_out, held_out, held_out, held_out]
    return {s: (x[i], y[i]) for s, i in zip(SPLITS, torch.split(order, sizes), strict=True)}
