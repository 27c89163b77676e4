"""What users may rely on of the rule that they get without asking for one."""

from __future__ import annotations

import pytest
import torch

from lopt import LearnedOptimizer
from lopt.core.random import make_generator


@pytest.mark.parametrize("unit", [1e-3, 1.0, 50.0])
def test_a_linear_regression_ends_at_least_squares_whatever_the_unit_of_its_targets(unit: float) -> None:
    generator = make_generator(0)
    x = torch.randn(200, 10, generator=generator)
    y = unit * (x @ torch.randn(10, 1, generator=generator) + 0.1 * torch.randn(200, 1, generator=generator))
    inputs = torch.cat([x, torch.ones(200, 1)], 1).double()
    least = (inputs @ torch.linalg.lstsq(inputs, y.double()).solution - y).square().mean()
    weight, bias = (torch.nn.Parameter(torch.zeros(n, 1)) for n in (10, 1))
    optimizer = LearnedOptimizer([weight, bias], num_steps=400)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (x @ weight + bias - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(least.item(), rel=1e-3)
