"""Celo's released weights train digits classifiers as published: final loss, accuracy, mean batch loss."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lopt import LearnedOptimizer
from lopt.rules import Rule
from lopt.rules.released import import_rule

WEIGHTS = Path(os.environ.get("LOPT_WEIGHTS", Path(__file__).parents[3] / "shared" / "weights"))
STEPS, BATCH, SEEDS = 1000, 64, 3
# rule, hidden widths, final loss, accuracy in %, mean batch loss; the final loss varies tenfold between seeds
PUBLISHED = [
    ("celo", (32,), 1e-5, 96.4, 0.0955),
    ("celo", (128, 128), 1.5e-4, 97.4, 0.0522),
    ("celo_adam", (32,), 2.0e-3, 97.0, 0.262),
    ("celo_adam", (128, 128), 7e-5, 98.1, 0.177),
]


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and classes, test images and classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=360, stratify=y, random_state=0)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    return train_x, torch.tensor(parts[2]), test_x, torch.tensor(parts[3])


def build(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """W ~ N(0, 1 / fan_in) layer by layer, b = 0, ReLU."""
    generator, layers = np.random.default_rng(seed), list[nn.Module]()
    for fan_in, fan_out in pairwise((64, *widths, 10)):
        layer = nn.Linear(fan_in, fan_out)
        weight = generator.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)
        layer.weight.data, layer.bias.data = torch.tensor(weight.T, dtype=torch.float32), torch.zeros(fan_out)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(rule: Rule, widths: tuple[int, ...], seed: int) -> tuple[float, float, float]:
    """Loss on the whole train split, accuracy in %, mean batch loss."""
    train_x, train_y, test_x, test_y = load_split()
    model, total = build(widths, seed), 0.0
    optimizer = LearnedOptimizer(model.named_parameters(), rule, num_steps=STEPS)
    draws = np.random.default_rng(1000 + seed)
    for _ in range(STEPS):
        batch = torch.from_numpy(draws.integers(0, len(train_x), BATCH))
        loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())
        total += float(loss.detach())
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean()
        return float(F.cross_entropy(model(train_x), train_y)), 100 * float(accuracy), total / STEPS


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="the released weights are not here (LOPT_WEIGHTS)")
@pytest.mark.parametrize(("name", "widths", "final", "accuracy", "mean"), PUBLISHED)
def test_released_weights_train_digits_as_published(
    name: str, widths: tuple[int, ...], final: float, accuracy: float, mean: float
) -> None:
    rule = import_rule(WEIGHTS / f"{name}.theta.state", name)
    runs = np.array([train(rule, widths, seed) for seed in range(SEEDS)])
    found = runs.mean(0)
    assert final / 200 < found[0] < 10 * final
    assert abs(found[1] - accuracy) < 0.5  # percent; one image is 0.28
    assert abs(found[2] - mean) < 0.003
