"""Families made from other families."""

from __future__ import annotations

import torch
from task_cases import draw_tasks
from torch.func import vmap

from lopt.tasks import TASKS, RandomScaling


def test_scaled_task_is_the_same_problem_in_other_units() -> None:
    inner = TASKS["quadratic"]()
    scaled = RandomScaling(inner, 3.0)
    tasks, params, batch = draw_tasks(scaled, 2)
    factors = tasks["coordinate_scale"]
    assert factors.max() > 3
    assert factors.min() < 0.3
    plain = {"x": params["x"] * factors}
    expected = vmap(inner.loss)(plain, {k: b for k, b in batch.items() if k != "coordinate_scale"})
    torch.testing.assert_close(vmap(scaled.loss)(params, batch), expected, rtol=1e-6, atol=0)
    assert plain["x"].abs().max() < 0.1  # starts where the inner family starts
