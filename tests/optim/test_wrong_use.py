"""What people give to the optimizer by mistake: refused by what was found and what to do, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lopt
from lopt.rules import RULES

MODEL = nn.Linear(3, 2)


def step(*arguments: Any, **options: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = lopt.LearnedOptimizer([p], guard=True)
    try:
        optimizer.step(*arguments, **options)
    finally:
        assert torch.equal(p, torch.ones(2))
        assert optimizer.report().steps == 0 or options


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: step(torch.tensor(1.0)), r"closure.*got a Tensor; pass the loss by its name, step\(loss=loss\)"),
        (lambda: step(1.0), r"closure.*got a float; pass"),
        (lambda: step(loss="low"), "must be one number, got a str"),
        (lambda: step(loss=torch.ones(3)), r"must be one number, got shape \[3\]"),
        (lambda: lopt.LearnedOptimizer(MODEL), r"got a Linear: give model.parameters\(\)"),  # type: ignore[arg-type]
        (lambda: lopt.LearnedOptimizer(MODEL.parameters), "got the method parameters: give"),  # type: ignore[arg-type]
        (lambda: lopt.LearnedOptimizer(MODEL.state_dict()), "got a OrderedDict: give"),
        (lambda: lopt.LearnedOptimizer(MODEL.parameters(), rule=5), "shipped name or the path.*got a int"),  # type: ignore[arg-type]
        (lambda: lopt.LearnedOptimizer(MODEL.parameters(), RULES["lstm"]), "the class LSTM: make one"),  # type: ignore[arg-type]
        (lambda: lopt.load(None), "shipped name or the path.*got a NoneType"),  # type: ignore[arg-type]
    ],
)
def test_wrong_use_is_refused_by_what_was_found_and_what_to_do(call: Callable[[], object], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
