"""Data, modules and losses as people give them to `ModuleTask`: read as they are meant, or refused with advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lopt.core.random import make_generator
from lopt.tasks import ModuleTask
from lopt.tasks.module import draw_weights

X, Y = torch.randn(60, 6, generator=make_generator(0)), torch.arange(60) % 3


class Rows(Dataset[Any]):
    """A data set of any rows."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def spoil(value: float) -> Tensor:
    spoilt = X.clone()
    spoilt[3, 2] = value
    return spoilt


def build() -> nn.Module:
    return nn.Linear(6, 3)


def make(data: Any = (X, Y), loss: Any = F.cross_entropy, build: Any = build, **options: Any) -> ModuleTask:
    return ModuleTask(build, loss, data, batch_size=8, **options)


@pytest.mark.parametrize(
    "data",
    [
        (X.numpy(), Y.numpy()),
        (X.tolist(), Y.tolist()),
        (X.clone().requires_grad_(), Y),
        TensorDataset(X, Y),
        list(zip(X, Y, strict=True)),
        Rows(lambda i: [X[i].numpy(), int(Y[i])]),
    ],
    ids=["arrays", "lists of numbers", "with a graph", "a dataset", "a list of pairs", "rows of arrays and numbers"],
)
def test_data_in_other_forms_is_the_same_data(data: Any) -> None:
    right, found = make().data, make(data).data
    for split, pair in right.items():
        assert all(map(torch.equal, pair, found[split]))
        assert not found[split][0].requires_grad


GIVEN: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a list of tensors": (lambda: make([X, Y]), TypeError, r"list of tensors: write tuple\(data\)"),
    "a DataLoader": (lambda: make(DataLoader(TensorDataset(X, Y))), TypeError, "a DataLoader: give its dataset"),
    "a stream": (lambda: make(Stream()), TypeError, r"Stream, which can only be gone through.*list\(data\)"),
    "an iterator": (lambda: make(zip(X, Y, strict=True)), TypeError, r"zip, which can only.*list\(data\)"),
    "a name": (lambda: make("digits"), TypeError, "tuple .inputs, targets.*got a str"),
    "nothing": (lambda: make(None), TypeError, "tuple .inputs, targets.*got a NoneType"),
    "one tensor": (lambda: make(X), TypeError, "tuple .inputs, targets.*got a Tensor"),
    "three tensors": (lambda: make((X, X, Y)), TypeError, "tuple of 3 entries: join"),
    "one in a tuple": (lambda: make((X,)), TypeError, "tuple of 1 entries"),
    "names of columns": (lambda: make({"x": X, "y": Y}), ValueError, "split must be one of train.*'x'"),
    "rows that are dicts": (
        lambda: make(Rows(lambda i: {"input": X[i], "label": Y[i]})),
        TypeError,
        r"pair .input, target.*row 0 is a dict with 'input', 'label': choose",
    ),
    "rows of three": (lambda: make(TensorDataset(X, X, Y)), TypeError, "row 0 is a tuple of 3 entries: choose"),
    "rows of one": (lambda: make(TensorDataset(X)), TypeError, "row 0 is a tuple of 1 entries"),
    "rows of unequal lengths": (
        lambda: make(Rows(lambda i: (torch.ones(3 + i % 3), 0))),
        ValueError,
        r"row 0 has \[3\], row 1 \[4\]: pad or crop",
    ),
    "lists of unequal lengths": (lambda: make(([[1.0], [1.0, 2.0]], Y)), TypeError, "inputs that are numbers"),
    "no examples": (lambda: make((X[:0], Y[:0])), ValueError, "at least one, got 0 and 0"),
    "a data set without rows": (lambda: make(TensorDataset(X[:0], Y[:0])), ValueError, "at least one, got 0 and 0"),
    "words": (lambda: make((X, np.array(["a"] * 60))), TypeError, "targets that are numbers.*numpy.str_"),
    "objects": (lambda: make((np.array([object()] * 60), Y)), TypeError, "inputs that are numbers.*numpy.object_"),
    "two numbers": (lambda: make((torch.tensor(1.0), torch.tensor(1))), TypeError, "first dimension, got a single"),
    "sparse": (lambda: make((X.to_sparse(), Y)), TypeError, r"dense inputs, got torch.sparse_coo: call to_dense"),
    "two devices": (lambda: make((X.to("meta"), Y)), ValueError, "inputs on meta and targets on cpu: move"),
    "another device": (lambda: make((X.to("meta"), Y.to("meta"))), ValueError, "must be on one device"),
    "NaN": (lambda: make((spoil(torch.nan), Y)), ValueError, "in 1 of 4 examples of 'inner_valid'"),
    "infinity": (lambda: make({"train": (X, Y), "test": (spoil(torch.inf), Y)}), ValueError, "1 of 60.* of 'test'"),
    "bytes": (lambda: make((X.to(torch.uint8), Y)), ValueError, "make the data float32.*found x torch.uint8"),
    "classes that are floats": (lambda: make((X, Y.float())), ValueError, "class targets int64.*y torch.float32"),
    "classes without outputs": (lambda: make((X, Y + 5)), ValueError, "from 0 to the number of outputs minus 1"),
    "a batch of halves": (lambda: ModuleTask(build, F.mse_loss, (X, Y), batch_size=2.5), ValueError, "whole, got 2.5"),  # type: ignore[arg-type]
    "a built module": (lambda: make(build=build()), TypeError, "a function that makes a new module.*got a Linear"),
    "no module": (lambda: make(build=lambda: None), TypeError, "must return an nn.Module, got a NoneType"),
    "lazy layers": (lambda: make(build=lambda: nn.LazyLinear(3)), ValueError, "ModuleTask.*lazy layers"),
    "layers of another size": (lambda: make(build=lambda: nn.Linear(5, 3)), ValueError, "layers must fit the inputs"),
    "two outputs": (lambda: make(build=lambda: nn.GRU(6, 3)), ValueError, "return the one tensor that the loss takes"),
    "no parameters": (lambda: make(build=nn.Flatten), ValueError, "needs trainable parameters.*none"),
    "a loss's class": (lambda: make(loss=nn.CrossEntropyLoss), TypeError, "the class CrossEntropyLoss: make one"),
    "a loss's name": (lambda: make(loss="mse"), TypeError, "function of outputs and targets, got a str"),
    "a loss of one argument": (lambda: make(loss=lambda o: o.sum()), ValueError, r"called as loss\(module"),
    "a loss per example": (lambda: make(loss=lambda o, t: o.sum(1)), ValueError, "scalar tensor, one number per batch"),
    "a loss that is a float": (lambda: make(loss=lambda o, t: o.sum().item()), ValueError, r"not `if`, item\(\)"),
    "a constant loss": (lambda: make(loss=lambda o, t: torch.ones(())), ValueError, "does not depend on the param"),
}


@pytest.mark.parametrize(("call", "kind", "words"), GIVEN.values(), ids=GIVEN)
def test_what_cannot_be_meant_is_refused_by_what_was_found_and_what_to_do(
    call: Callable[[], object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as error:
        call()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


def test_a_loss_that_knows_what_nan_means_may_have_it_in_its_data() -> None:
    def masked(output: Tensor, target: Tensor) -> Tensor:
        return torch.where(target.isnan(), 0.0, (output - target.nan_to_num()) ** 2).mean()

    targets = torch.where(torch.arange(60)[:, None] % 2 == 0, torch.nan, X[:, :3])
    task = make((X, targets), masked)
    weights = {key: w[None] for key, w in draw_weights(build, make_generator(0)).items()}
    batch = task.batch({}, torch.zeros(1, dtype=torch.int64))
    known = ~batch["y"].isnan().any(2)
    right = ((batch["x"] @ weights["weight"].mT + weights["bias"] - batch["y"])[known] ** 2).sum() / batch["y"].numel()
    torch.testing.assert_close(task.losses(weights, batch), right[None])
