"""What a suite is made of: an ordinary PyTorch program, declared, that any `torch.optim.Optimizer` trains.

A task is a module, data in a train and a held-out part, and a loss, as a user would write them. Everything random is a
function of a seed: the same initial weights and the same batches for every optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import in_float32

Batch = tuple[Tensor, ...]
"""What a loss takes beside the module: inputs, targets or whatever else the task has."""

Loss = Callable[[nn.Module, Batch], Tensor]
Sample = Callable[[Batch, int, Generator, float], Batch]
"""Draws a batch of the train part: (train, batch size, generator, share of the run that is done)."""


class Data(NamedTuple):
    """The data of a task.

    Attributes:
        train: tensors with one entry per example, or whatever the task's `sample` draws from.
        held_out: one fixed batch, which is never trained on.
    """

    train: Batch
    held_out: Batch


class Validation(NamedTuple):
    """What a trained module reaches on held-out data.

    Attributes:
        loss: of the held-out batch.
        accuracy: share of right answers; None where there are none to be right.
    """

    loss: float
    accuracy: float | None


class Start(NamedTuple):
    """What tells a task from others of its name without training: an archived run belongs to a task that starts so.

    Attributes:
        parameters: number of them that are trained.
        num_steps, batch_size: of a run.
        loss: of the first batch of seed 0 before the first step.
        validation: of the same module.
    """

    parameters: int
    num_steps: int
    batch_size: int
    loss: float
    validation: float

    def resembles(self, other: Start) -> bool:
        """Whether two starts are of one task: equal counts, and losses that differ by rounding alone."""
        close = all(abs(a - b) <= 1e-3 * max(abs(a), abs(b)) for a, b in zip(self[3:], other[3:], strict=True))
        return self[:3] == other[:3] and close


@dataclass(frozen=True)
class SuiteTask:
    """One program of a suite.

    Attributes:
        name: unique among all suites.
        title: what is trained on what, for readers.
        architecture, data_set: development and held-out tasks have none in common.
        num_steps, batch_size: of a run.
        build: the module; it may draw its weights from torch's global generator, which `model` seeds and restores.
        load: the data; called often, so what is costly in it should be cached.
        loss: what is trained, in training mode.
        sample: draws a batch; by default the train part is shuffled anew for every epoch.
        validation: loss of the held-out batch, without gradients, in evaluation mode; by default `loss`.
        accuracy: share of right answers in the held-out batch, likewise.
    """

    name: str
    title: str
    architecture: str
    data_set: str
    num_steps: int
    batch_size: int
    build: Callable[[], nn.Module]
    load: Callable[[], Data]
    loss: Loss
    sample: Sample | None = None
    validation: Loss | None = None
    accuracy: Loss | None = None

    def model(self, seed: int) -> nn.Module:
        """The module with the initial weights of a seed; torch's global generator is left as it was."""
        with in_float32(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(derive_seeds(seed, "suite model")))
            return self.build()

    @in_float32()
    def batch(self, seed: int, step: int) -> Batch:
        """The mini-batch of a step, counted from 0: a function of seed and step alone."""
        train = self.load().train
        if self.sample is not None:
            generator = make_generator(derive_seeds(seed, "suite batch", step))
            return self.sample(train, self.batch_size, generator, step / self.num_steps)
        count = len(train[0])
        epoch, place = divmod(step, count // self.batch_size)
        rows = _shuffle(seed, epoch, count)[place * self.batch_size : (place + 1) * self.batch_size]
        return tuple(x[rows] for x in train)

    @in_float32()
    def validate(self, model: nn.Module) -> Validation:
        """What a module reaches on the held-out data; its mode, buffers and gradients stay as they are."""
        training, batch = model.training, self.load().held_out
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = float((self.validation or self.loss)(model, batch))
            accuracy = None if self.accuracy is None else float(self.accuracy(model, batch))
        model.train(training)
        return Validation(loss, accuracy)

    @in_float32()
    def start(self) -> Start:
        """What the task starts from, computed: by this a stale archive is noticed."""
        model = self.model(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = float(self.loss(model, self.batch(0, 0)).detach())
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Start(count, self.num_steps, self.batch_size, loss, self.validate(model).loss)


@lru_cache(maxsize=8)
def _shuffle(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=make_generator(derive_seeds(seed, "suite order", epoch)))


# -- losses that many tasks share --------------------------------------------------------------------------------------


def classify(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of logits `[..., classes]` for inputs and classes `[...]`."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Share of inputs whose largest logit is that of their class."""
    x, y = batch
    right: Tensor = (model(x).argmax(-1) == y).float().mean()
    return right


def regress(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of outputs for inputs and targets."""
    x, y = batch
    return nn.functional.mse_loss(model(x), y)
