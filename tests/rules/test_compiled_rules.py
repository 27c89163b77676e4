"""Every rule's update is one graph for torch.compile."""

from __future__ import annotations

import pytest
import torch

from lopt.core.random import make_generator
from lopt.rules import RULES


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_update_compiles_as_one_graph_and_steps_the_same(name: str) -> None:
    torch._dynamo.reset()
    rule, generator = RULES[name](), make_generator(0)
    shapes = {"w": (2, 5, 7), "b": (2, 5)}
    params = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    grads = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    state, loss, planned = rule.init_state(params, 1), torch.ones(2), torch.full((2,), 50)
    compiled = torch.compile(rule.update, dynamic=False, fullgraph=True)
    with torch.no_grad():
        ours, _ = compiled(grads, params, state, loss, planned)
        theirs, _ = rule.update(grads, params, state, loss, planned)
    for key, p in params.items():
        moved = (theirs[key] - p).norm()
        assert moved > 0
        assert (ours[key] - theirs[key]).norm() < 1e-6 * p.norm() + 1e-3 * moved
