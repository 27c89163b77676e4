"""`ModuleTask`: what it takes, what it measures and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from task_cases import draw_tasks, make_classes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lopt.core.random import make_generator
from lopt.tasks import ModuleTask


class Functional(nn.Module):
    """A layer followed by any function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Recurrent(nn.Module):
    """The outputs of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.cell(x)[0]
        return output


class Listed(nn.Module):
    """A layer whose weight is also in a list, which is what forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] + 0 * self.layer.bias


class Square(torch.autograd.Function):
    """What autograd can do and `vmap` cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]  # type: ignore[no-any-return]


class Temperature(nn.Module):
    """A loss that has something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.scale * output, y)


class Running(nn.Module):
    """A loss that keeps a mean of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(output, y)
        self.mean.mul_(0.9).add_(loss.detach())
        return loss


def count_calls() -> Callable[[Tensor], Tensor]:
    calls = count(1)
    return lambda h: h / next(calls)


def hook_gradients(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        p.register_hook(lambda grad: 0.5 * grad)
    return layer


def hook_backward(layer: nn.Module) -> nn.Module:
    layer.register_full_backward_hook(lambda _, grads, __: tuple(0.5 * g for g in grads))
    return layer


def make_simple_task(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    dtype: torch.dtype = torch.float32,
) -> ModuleTask:
    x = torch.randn(20, 2, generator=make_generator(0)).to(dtype)
    return ModuleTask(build, loss, (x, x), batch_size=4)


def test_module_task_reads_a_dataset_and_divides_it() -> None:
    x = torch.arange(60.0)[:, None]
    task = ModuleTask(lambda: nn.Linear(1, 1), F.mse_loss, TensorDataset(x, 2 * x), batch_size=4)
    sizes = {split: len(part[0]) for split, part in task.data.items()}
    assert sizes == {"train": 48, "inner_valid": 4, "outer_valid": 4, "test": 4}
    assert sorted(torch.cat([part[0] for part in task.data.values()])[:, 0].tolist()) == list(range(60))


def test_module_task_reads_arrays() -> None:
    x, y = make_classes()
    task = ModuleTask(lambda: nn.Linear(3, 2), F.cross_entropy, (x.numpy(), y.numpy()))
    same = ModuleTask(lambda: nn.Linear(3, 2), F.cross_entropy, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(task.data["test"], same.data["test"], strict=True))


def test_frozen_parameters_and_constant_buffers_are_not_learned_and_equal_for_all_tasks() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
        module[0].requires_grad_(False)
        return module

    task = make_simple_task(build)
    _, params, batch = draw_tasks(task, 1)
    assert set(task.spec.names) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    one = {k: p[0] for k, p in params.items()}
    fixed = {k: v for k, v in task.module.state_dict().items() if k not in one}
    expected = F.mse_loss(functional_call(build(), {**fixed, **one}, (batch["x"][0],)), batch["y"][0])
    assert torch.equal(task.loss(one, {k: b[0] for k, b in batch.items()}), expected)


@pytest.mark.parametrize(
    ("outputs", "targets", "known"),
    [
        (torch.eye(3), torch.tensor([0, 1, 0]), {"accuracy": 2 / 3}),
        (torch.eye(3), torch.tensor([0, -100, 0]), {"accuracy": 1 / 2}),  # left out, as by cross-entropy
        (torch.eye(3).expand(2, 3, 3), torch.arange(3).expand(2, 3), {"accuracy": 1.0}),
        (torch.eye(3), torch.ones(3), {}),
        (torch.eye(3), torch.ones(3, dtype=torch.bool), {}),
        (torch.ones(3), torch.ones(3, dtype=torch.int64), {}),
        (torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), {}),
        (torch.eye(3), torch.eye(3, dtype=torch.int64), {}),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.int64), {}),  # classes in the middle
    ],
)
def test_accuracy_is_reported_only_for_classes(outputs: Tensor, targets: Tensor, known: dict[str, float]) -> None:
    task = make_simple_task(lambda: nn.Linear(2, 2))
    task.module = nn.Identity()
    assert task.metrics({}, {"x": outputs, "y": targets}) == pytest.approx(known)


def test_trying_a_module_out_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make_simple_task(lambda: Functional(torch.tanh))
    with pytest.raises(ValueError, match="running_mean"):
        make_simple_task(lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_simple_task(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout())), "p=0"),
        (lambda: make_simple_task(Recurrent), "nn.GRU.*write the cell"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h if h.sum() > 0 else -h)), "torch.where"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h + h[h > 0].sum())), "torch.where"),
        (lambda: make_simple_task(lambda: Functional(lambda h: torch.zeros(4, 2).add_(h))), "make a new one"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), dtype=torch.float64), "float32.*found x torch.float64"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2).double(), dtype=torch.float64), "all float32.*float64"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), lambda a, b: (a - b) ** 2), "scalar tensor"),
        (lambda: make_simple_task(nn.Identity), "Identity needs trainable parameters.*none"),
        (lambda: make_simple_task(lambda: nn.Linear(3, 2)), r"layers must fit the inputs.*x torch.float32 \[4, 2\]"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h.exp().relu_())), "make a new one"),
        (lambda: make_simple_task(Listed), "as attributes of their modules"),
        (lambda: make_simple_task(lambda: hook_gradients(nn.Linear(2, 2))), "hooks on gradients do not act"),
        (lambda: make_simple_task(lambda: nn.Sequential(hook_gradients(nn.Linear(2, 2)))), "hooks on gradients do not"),
        (lambda: make_simple_task(lambda: hook_backward(nn.Linear(2, 2))), "backward hooks.*must go"),
        (lambda: make_simple_task(lambda: Functional(Square.apply)), "autograd.Function.*must go"),
        (lambda: make_simple_task(lambda: Functional(partial(checkpoint, torch.tanh, use_reentrant=False))), "must go"),
        (lambda: make_simple_task(lambda: Functional(count_calls())), "keep nothing from call to call"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h * random.random())), "no random numbers"),
        (
            lambda: make_simple_task(lambda: nn.Sequential(nn.ELU(inplace=True), nn.Linear(2, 2))),
            "batch.x.*inplace=False",
        ),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), lambda a, b: (a - b.mul_(2)).mean()), r"batch\.y"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), Running()), r"changes \['loss.mean'\]"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), Temperature()), r"\['scale'\] that no task would learn"),
        (lambda: make_simple_task(lambda: nn.LazyLinear(2)), "have no shapes yet"),
        (lambda: make_simple_task(lambda: Functional(torch.Tensor.detach)), "not depend on the parameters"),
    ],
)
def test_module_that_cannot_be_batched_over_tasks_is_refused_with_advice(
    make: Callable[[], ModuleTask], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModuleTask(lambda: nn.BatchNorm1d(2), F.mse_loss, (torch.ones(20, 2),) * 2), "running_mean"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, (torch.ones(20, 2), torch.ones(19, 2))), "20 and 19"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, (torch.ones(9, 2),) * 2), "too few"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, {"test": (torch.ones(9, 2),) * 2}), "no 'train'"),
    ],
)
def test_module_or_data_that_cannot_be_used_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
