"""The last part of the demo: an ordinary PyTorch training loop in which only the optimizer's line changes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt.core.random import make_generator
from lopt.optim.learned_optimizer import DEFAULT_RULE, LearnedOptimizer
from lopt.tasks.mlp import load_digits

STEPS = 200
ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def train_classifier(rule: str | os.PathLike[str]) -> Iterator[str]:
    """Train a 64-40-40-10 ReLU network on the digits with the rule in a file, the shipped rule and Adam."""
    yield _describe("LearnedOptimizer, this rule", *_fit(lambda params: LearnedOptimizer(params, rule=rule)))
    yield _describe(f"LearnedOptimizer, {DEFAULT_RULE}", *_fit(LearnedOptimizer))
    runs = {lr: _fit(lambda params, lr=lr: torch.optim.Adam(params, lr=lr)) for lr in ADAM_RATES}
    yield _describe(f"Adam, its default {ADAM_RATES[0]}", *runs[ADAM_RATES[0]])
    best = min(runs, key=lambda lr: runs[lr][0])
    yield _describe(f"Adam, best of {len(runs)} rates: {best}", *runs[best])


def _describe(name: str, loss: float, accuracy: float) -> str:
    return f"{name:<31} train loss {loss:.4f}, test accuracy {accuracy:.1%}"


def _fit(build: Callable[..., torch.optim.Optimizer]) -> tuple[float, float]:
    """Final loss on the train split and accuracy on the test split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 10))
    optimizer = build(model.parameters())
    digits = load_digits()
    x, y = digits["train"]
    generator = make_generator(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this run goes beyond")  # on purpose, and the demo says so
        for _ in range(STEPS):
            index = torch.randint(len(x), (128,), generator=generator)
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(_measure_loss(model, x, y)), _measure_accuracy(model, *digits["test"])


@torch.no_grad()
def _measure_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def _measure_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())
